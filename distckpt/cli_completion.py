"""The command ``distckpt completion``."""

from __future__ import annotations

import click

_SHELLS = ("bash", "zsh", "fish")
_PROGRAM = "distckpt"
# The name by which click asks itself what to offer.
_VARIABLE = "_DISTCKPT_COMPLETE"


@click.command(name="completion")
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete checkpoints.

    \b
    bash  eval "$(distckpt completion bash)"      in ~/.bashrc
    zsh   eval "$(distckpt completion zsh)"       in ~/.zshrc
    fish  distckpt completion fish > ~/.config/fish/completions/distckpt.fish

    What stands for a checkpoint completes to those in a run directory: runs/gpt/<TAB>.
    """  # noqa: D301  # it is to be a backspace, which tells click not to fold
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)
    assert complete is not None, shell
    command = context.find_root().command
    click.echo(complete(command, {}, _PROGRAM, _VARIABLE).source())
