"""What came of trying to break something, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from distckpt.errors import DistckptError


class Torn(AssertionError):
    """Something that is listed is not whole, or not what was saved."""


class Lost(AssertionError):
    """Something acknowledged is not listed, or something else is."""


class Hung(AssertionError):
    """Somebody waits for longer than he may."""


class NotReopened(AssertionError):
    """What came back could not go on."""


class Wrong(AssertionError):
    """Something else is not as promised."""


def demand(kind: type[AssertionError], condition: bool, found: object) -> None:
    """Raise that kind with what was found, unless it is as it should be."""
    if not condition:
        raise kind(f"{found!s:.1500}")


@dataclass
class Figures:
    """What came of the points.

    Attributes:
        tried: How many there were.
        torn, lost, hung, unopenable, wrong: What was found; the first few as text.
        others: What else is worth counting.
    """

    tried: int = 0
    torn: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    unopenable: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)

    def check(self, where: object, body: Callable[[], object]) -> bool:
        """Run a check and file what it finds; returns whether all is well."""
        try:
            body()
        except Torn as error:
            self.torn.append(f"{where}: {error}")
        except Lost as error:
            self.lost.append(f"{where}: {error}")
        except (Hung, TimeoutError) as error:
            self.hung.append(f"{where}: {error}")
        except NotReopened as error:
            self.unopenable.append(f"{where}: {error}")
        except DistckptError as error:
            self.unopenable.append(f"{where}: {type(error).__name__}: {error}")
        except AssertionError as error:
            self.wrong.append(f"{where}: {error}")
        else:
            return True
        return False

    def count(self, what: str, number: int = 1) -> None:
        """Count something else."""
        self.others[what] = self.others.get(what, 0) + number

    @property
    def findings(self) -> list[str]:
        """All that was found."""
        return [*self.torn, *self.lost, *self.hung, *self.unopenable, *self.wrong]

    def add(self, other: Figures) -> None:
        """Add those of other points."""
        self.tried += other.tried
        for what, number in other.others.items():
            self.count(what, number)
        for name in ("torn", "lost", "hung", "unopenable", "wrong"):
            getattr(self, name).extend(getattr(other, name))

    def __str__(self) -> str:
        others = "".join(
            f", {number} {name}" for name, number in sorted(self.others.items())
        )
        return (
            f"{self.tried} tried, {len(self.torn)} torn, {len(self.lost)} lost, "
            f"{len(self.hung)} hung, {len(self.unopenable)} not reopenable, "
            f"{len(self.wrong)} otherwise wrong{others}"
        )

    def demand_zeros(self) -> None:
        """Fail with the first findings if there are any."""
        assert not self.findings, "\n".join([str(self), *self.findings[:8]])
