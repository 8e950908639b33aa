"""The words for what to save when, and what to keep: small values, joined with ``|``.

``checkpoint_interval=every(steps=500) | every(minutes=20) | on_signal("SIGTERM")`` and
``max_to_keep=latest(3) | best(2, "val_loss", mode="min") | every(hours=6)``. They say
nothing by themselves: ``gate.py`` and ``retention.py`` give them their meaning.
"""

from __future__ import annotations

import ast
import math
import operator
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import wraps
from inspect import signature
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, overload

from distckpt import strict_json, words
from distckpt.durations import seconds_of
from distckpt.errors import ConfigError
from distckpt.locations import absolute, checked_path
from distckpt.near import did_you_mean, near_names

# The system does not let anybody handle these; Python and Ctrl-C have use for the others.
_NOT_HANDLED = {"SIGKILL", "SIGSTOP", "SIGINT", "SIGCHLD", "SIGSEGV", "SIGFPE", "SIGBUS"}
_SECONDS_OF = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
MIN, MAX = "min", "max"
# What ``every`` takes.
_UNITS = ("steps", *_SECONDS_OF, "overhead", "optimal_for_mtbf_hours")


class Rule:
    """One word, or several with ``|`` between them."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)  # the way it is written

    def __or__(self, other: Any) -> AnyOf:
        return AnyOf((*parts_of(self), *parts_of(other)))

    def __ror__(self, other: Any) -> AnyOf:
        return AnyOf((*parts_of(other), *parts_of(self)))


@dataclass(frozen=True, slots=True, repr=False)
class AnyOf(Rule):
    """Rules with ``|`` between them: each is asked, and each counts.

    Attributes:
        parts: Rules, integers, functions; None for what None means there.
    """

    parts: tuple[Any, ...]

    def __str__(self) -> str:
        return " | ".join(map(spelled, self.parts))


def parts_of(rule: Any) -> tuple[Any, ...]:
    """Return what stands between the ``|`` of a rule, or of what may stand there.

    Raises:
        ConfigError: It may not.
    """
    if isinstance(rule, AnyOf):
        return rule.parts
    if any(rule is word for word in (every, latest, best, on_signal, on_request)):
        name = rule.__name__
        msg = f"{name} is a function that makes a rule: write {name}(...)."
        raise ConfigError(msg)
    if rule is None or type(rule) is int or isinstance(rule, Rule) or callable(rule):
        return (rule,)
    if isinstance(rule, timedelta):
        return (every(seconds=rule),)
    msg = f"{rule!r:.100} is no rule that could stand beside '|'."
    raise ConfigError(msg)


def spelled(rule: Any) -> str:
    """Spell a rule the way it is written: the same on all ranks that have the same."""
    if callable(rule) and not isinstance(rule, Rule):
        return str(getattr(rule, "__qualname__", type(rule).__qualname__))
    return str(rule)


@dataclass(frozen=True, slots=True, repr=False)
class Every(Rule):
    """One for every so many; see ``every``.

    Attributes:
        unit: The name of the argument that was given to ``every``.
        amount: Of it.
    """

    unit: str
    amount: float

    @property
    def seconds(self) -> float | None:
        """The same in seconds; None if it is no time."""
        length = _SECONDS_OF.get(self.unit)
        return None if length is None else length * self.amount

    def __str__(self) -> str:
        return f"every({self.unit}={self.amount!r})"


@dataclass(frozen=True, slots=True, repr=False)
class Latest(Rule):
    """The newest few; see ``latest``."""

    number: int

    def __str__(self) -> str:
        return f"latest({self.number})"


@dataclass(frozen=True, slots=True, repr=False)
class Best(Rule):
    """The best few by a metric; see ``best``."""

    number: int
    metric: str
    mode: str

    def __str__(self) -> str:
        metric = strict_json.quote(self.metric)
        return f'best({self.number}, {metric}, mode="{self.mode}")'


@dataclass(frozen=True, slots=True, repr=False)
class OnSignal(Rule):
    """When a job is told that it will be ended; see ``on_signal``."""

    signals: tuple[str, ...]
    file: str | None
    grace_period_seconds: float

    def __str__(self) -> str:
        # Not which file: it may be one of each host's own.
        given = [f'"{name}"' for name in self.signals]
        given += ["file=..."] if self.file is not None else []
        given.append(f"grace_period_seconds={self.grace_period_seconds}")
        return f"on_signal({', '.join(given)})"


@dataclass(frozen=True, slots=True, repr=False)
class OnRequest(Rule):
    """When another process asks for it; see ``on_request``."""

    def __str__(self) -> str:
        return "on_request()"


@dataclass(frozen=True, slots=True, repr=False)
class CheckpointInfo:
    """A committed checkpoint, as a retention rule of your own sees it.

    Attributes:
        name: Its name in the run directory: the checkpoint's name and number.
        number: The last part of that.
        step: The training step; None without a step counter.
        time: ``time.time()`` of the chief when it was written.
        size_bytes: Of its tensor files.
        metrics: What ``save(metrics=...)`` was given. One that is no finite number is None.
    """

    name: str
    number: int
    step: int | None
    time: float
    size_bytes: int
    metrics: dict[str, float | None]

    @property
    def date(self) -> datetime:
        """The time as a datetime in UTC."""
        return words.utc(self.time)

    def __repr__(self) -> str:
        return (
            f"CheckpointInfo(name={self.name!r}, number={self.number}, step={self.step}, "
            f"date={words.utc_date(self.time)!r}, size_bytes={self.size_bytes}, "
            f"metrics={self.metrics})"
        )


_Parameters = ParamSpec("_Parameters")
_Made = TypeVar("_Made")


def _says_how(
    example: Callable[[tuple[Any, ...], dict[str, Any]], str],
) -> Callable[[Callable[_Parameters, _Made]], Callable[_Parameters, _Made]]:
    """Have a call with other arguments answered with the line that was meant.

    Args:
        example: Makes that line of the arguments.
    """

    def decorate(function: Callable[_Parameters, _Made]) -> Callable[_Parameters, _Made]:
        takes = signature(function)

        @wraps(function)
        def call(*arguments: _Parameters.args, **named: _Parameters.kwargs) -> _Made:
            try:
                takes.bind(*arguments, **named)
            except TypeError as error:
                given = [f"{value!r:.50}" for value in arguments]
                given += [f"{name}={value!r:.50}" for name, value in named.items()]
                msg = (
                    f"{function.__name__}({', '.join(given)}): {error}; write "
                    f"{example(arguments, named)}."
                )
                raise ConfigError(msg) from None
            return function(*arguments, **named)

        return call

    return decorate


def _meant_by_every(arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    """Spell the call of ``every`` that these arguments may have meant."""
    for name, value in named.items():
        near = near_names(name, _UNITS, 1)
        if name not in _UNITS and near:
            return f"every({near[0]}={value!r:.50})"
    amount = arguments[0] if arguments else 500
    if isinstance(amount, timedelta):
        return f"every(minutes={amount.total_seconds() / 60:g})"
    is_number = type(amount) in (int, float)
    return f"every(steps={amount if is_number else 500!r:.50})"


def _meant_by_latest(arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    numbers = [value for value in (*arguments, *named.values()) if type(value) is int]
    return f"latest({numbers[0] if numbers else 3})"


def _meant_by_best(arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    """Spell the call of ``best`` that these arguments may have meant."""
    values = [*arguments, *(value for name, value in named.items() if name != "mode")]
    metrics = [value for value in values if isinstance(value, str) and value]
    if metrics[1:] and metrics[-1] in (MIN, MAX):
        named = {"mode": metrics.pop(), **named}  # given without its name
    numbers = [f"{value}, " for value in values if type(value) is int and value > 0]
    number = numbers[0] if numbers else ""
    metric = strict_json.quote(metrics[0] if metrics else "val_loss")
    mode = named.get("mode")
    if mode in (MIN, MAX):
        return f'best({number}{metric}, mode="{mode}")'
    return f'best({number}{metric}, mode="{MIN}") if the lowest is best, else mode="{MAX}"'


KeepFunction: TypeAlias = Callable[[Sequence[CheckpointInfo]], Iterable[CheckpointInfo]]


@_says_how(_meant_by_every)
def every(
    *,
    steps: int | None = None,
    seconds: float | timedelta | None = None,
    minutes: float | timedelta | None = None,
    hours: float | timedelta | None = None,
    overhead: float | None = None,
    optimal_for_mtbf_hours: float | None = None,
) -> Every:
    """Save, or keep, one for every so many steps, or so much time: one of these arguments.

    For ``checkpoint_interval``:

    - ``steps``: at least so many since the last save or restore; a plain integer says the
      same.
    - ``seconds``, ``minutes``, ``hours``: at least so long since the last save, by the
      chief's clock. The ranks ask about once a second. A plain ``timedelta`` says the same.
    - ``overhead``: as often as saving costs no more than this part of the time: 0.01 for
      one percent. What a save costs is measured: how long calls were blocked, and by how
      much steps were slower meanwhile.
    - ``optimal_for_mtbf_hours``: how often loses the least time in all, for a job that
      fails once in so many hours: the square root of twice that time and of what a save
      costs (J. W. Young, "A first order approximation to the optimum checkpoint interval",
      1974).

    For ``max_to_keep``:

    - ``steps``: of those between two multiples of it, the first.
    - ``seconds``, ``minutes``, ``hours``: one for so much time, the oldest first.

    Raises:
        ConfigError: None of them is given, or more than one, or one that is not positive.
    """
    arguments = {
        "steps": steps,
        "seconds": seconds,
        "minutes": minutes,
        "hours": hours,
        "overhead": overhead,
        "optimal_for_mtbf_hours": optimal_for_mtbf_hours,
    }
    given = {unit: amount for unit, amount in arguments.items() if amount is not None}
    if len(given) != 1:
        msg = (
            f"every: give one of {', '.join(arguments)}, such as every(steps=500); got "
            f"{given or 'none'}."
        )
        raise ConfigError(msg)
    amount: Any
    ((unit, amount),) = given.items()
    if isinstance(amount, timedelta) and unit in _SECONDS_OF:
        amount = amount.total_seconds() / _SECONDS_OF[unit]
    if unit == "steps":
        amount = _positive("every: steps", amount)
    elif type(amount) not in (int, float) or not 0 < amount < math.inf:
        msg = f"every: {unit} must be a positive number, got {amount!r:.100}."
        raise ConfigError(msg)
    if unit == "overhead" and amount >= 1:
        msg = f"every: overhead is a part of the time, less than 1; got {amount!r:.100}."
        raise ConfigError(msg)
    return Every(unit, amount)


@_says_how(_meant_by_latest)
def latest(number: int = 1) -> Latest:
    """Keep the newest few: the last so many that were committed."""
    return Latest(_positive("latest", number))


@overload
def best(number: int, metric: str, *, mode: Literal["min", "max"]) -> Best: ...


@overload
def best(metric: str, /, *, mode: Literal["min", "max"]) -> Best: ...


@overload
def best(*, metric: str, mode: Literal["min", "max"]) -> Best: ...


@_says_how(_meant_by_best)
def best(
    number: int | str = 1, metric: str | None = None, *, mode: Literal["min", "max"]
) -> Best:
    """Keep the best few, by a metric given to ``save(metrics=...)``.

    ``best(2, "val_loss", mode="min")``; ``best("val_loss", mode="min")`` keeps one. A
    checkpoint without that metric, or with one that is not a number (NaN), is never among
    them, and displaces none. Of equal ones the newer is the better.

    Args:
        number: How many.
        metric: The metric's name.
        mode: Whether the lowest (``"min"``) or the highest (``"max"``) is best.

    Raises:
        ConfigError: Another number, metric or mode.
    """
    if isinstance(number, str):
        if metric is not None:
            hint = _meant_by_best((number, metric), {"mode": mode})
            msg = f"best: the number comes first; write {hint}."
            raise ConfigError(msg)
        metric = number
        number = 1
    if not isinstance(metric, str) or not metric:
        hint = _meant_by_best((number,), {"mode": mode})
        msg = f"best: metric must be the name of one, got {metric!r:.100}; write {hint}."
        raise ConfigError(msg)
    if mode not in (MIN, MAX):
        msg = f"best: mode must be {MIN!r} or {MAX!r}, got {mode!r:.100}."
        raise ConfigError(msg)
    return Best(_positive("best", number), metric, mode)


def _positive(what: str, number: Any) -> int:
    try:
        counted = operator.index(number)
    except TypeError:
        counted = 0
    if counted < 1 or isinstance(number, bool):
        msg = f"{what}: a positive integer is needed, got {number!r:.100}."
        raise ConfigError(msg)
    return counted


def on_signal(
    *signals: str,
    file: str | os.PathLike[str] | None = None,
    grace_period_seconds: float | timedelta = 30.0,
) -> OnSignal:
    """Save once more when the job is told that it will be ended: preemption.

    For ``checkpoint_interval``: ``500 | on_signal("SIGTERM")`` saves every 500 steps and
    once when a rank gets a SIGTERM. The signal only sets a flag. The ranks agree on it at
    the next call of ``save()`` that asks (about one a second), whichever of them was told;
    that call saves, whatever the step and synchronously, and from then on
    ``manager.should_stop`` is true on all ranks. Call ``save()`` in long evaluations, too.

    The save is not begun if it could not end in time: if the longest of the last saves of
    this job took longer than is left of the grace period. (Newest is then what there was.)

    If no call of the manager is made for the time of three steps, and at least 5 seconds,
    after a signal, it acts as if this rule were not there: a process that hangs, or is
    about something else, ends at once. So does one whose manager is broken: torchrun sends
    SIGTERM to all workers when one was lost.

    Args:
        signals: Names, such as ``"SIGTERM"`` or, for Slurm's ``--signal``, ``"SIGUSR1"``.
        file: Or the path of a file: once it is there, the job is to stop. Looked for by
            every rank, so it may be another one on each host.
        grace_period_seconds: How long after the signal the job is ended, in seconds or as
            a timedelta; torchrun's launcher, Slurm and Kubernetes wait for 30 seconds, if
            not told otherwise.

    Raises:
        ConfigError: A signal that there is not, or that cannot be handled; or none at all.
    """
    for name in signals:
        number = getattr(signal, name, None) if str(name).startswith("SIG") else None
        if not isinstance(number, signal.Signals) or name in _NOT_HANDLED:
            msg = f"on_signal: {name!r:.100} is not a signal that can be handled."
            raise ConfigError(msg)
    if not signals and file is None:
        msg = 'on_signal: name a signal, such as on_signal("SIGTERM"), or a file.'
        raise ConfigError(msg)
    path = None
    if file is not None:
        # Absolute: it is looked for as long as the job runs, perhaps after a chdir.
        path = absolute(checked_path(file, "on_signal: the file"))
    grace = seconds_of("on_signal: grace_period_seconds", grace_period_seconds)
    return OnSignal(tuple(dict.fromkeys(signals)), path, grace)


def on_request() -> OnRequest:
    """Save when another process asks for it: ``distckpt request-save``, ``request_save``.

    For ``checkpoint_interval``: ``every(steps=500) | on_request()``. The chief looks for
    requests about once a second, and the call at which all ranks hear of one saves,
    whatever its step. Without this rule a request waits for the next save.
    """
    return OnRequest()


def parse(text: str) -> Rule:
    """Read rules for what to keep as they are written: ``latest(3) | every(hours=6)``.

    Nothing is run: calls of ``latest``, ``best`` and ``every`` with plain arguments, and
    ``|`` between them, are all there is.

    Raises:
        ConfigError: It is something else.
    """
    try:
        return _parse(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        if isinstance(error, ConfigError):
            raise
        msg = (
            f"{text!r:.200} is no rule: write latest(...), best(...) or every(...), with | "
            f"between them ({error})."
        )
        raise ConfigError(msg) from error


def best_rules(rules: Iterable[str]) -> list[Best]:
    """Return those of a record's rules that say which checkpoint is the best."""
    found: list[Best] = []
    for text in rules:
        try:
            found += [part for part in parts_of(parse(text)) if isinstance(part, Best)]
        except ConfigError:
            continue  # a number, or a function of the user's
    return found


def _parse(node: ast.expr) -> Rule:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _parse(node.left) | _parse(node.right)
    known: dict[str, Callable[..., Rule]] = {"latest": latest, "best": best, "every": every}
    function = node.func if isinstance(node, ast.Call) else node
    name = function.id if isinstance(function, ast.Name) else ""
    if not isinstance(node, ast.Call) or name not in known:
        hint = "" if name in known else did_you_mean(name, known).removesuffix(".")
        msg = f"not a call of {', '.join(known)}: {ast.unparse(node):.100}{hint}"
        raise ValueError(msg)
    positional = [ast.literal_eval(argument) for argument in node.args]
    by_name = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    return known[name](*positional, **by_name)
