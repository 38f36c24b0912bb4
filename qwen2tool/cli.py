"""The command line: what a wrong flag, a user's error and Ctrl-C print and return; `commands` holds the commands.

Typer reads annotations at run time, so those of the commands are real; everything heavy is imported inside them.
"""

import logging
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from qwen2tool import __version__
from qwen2tool.commands.convert import convert
from qwen2tool.commands.demo import demo
from qwen2tool.commands.inspect import inspect
from qwen2tool.commands.merge import merge
from qwen2tool.commands.push import push
from qwen2tool.commands.routes import routes
from qwen2tool.commands.train import train
from qwen2tool.commands.verify import verify_equivalence
from qwen2tool.errors import EXIT_UNUSABLE, UserError

app = typer.Typer(
    name="qwen2tool",
    help="Fine-tune, merge and verify Qwen2-architecture models without losing their q, k and v biases.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130
SMALLER = "In training lower --batch-size or --max-length, or pass --quantize nf4; else use a larger machine."


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs one command; a user's error becomes one line on stderr and its exit code, never a traceback."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # reports optional CPU kernels that it does without
    # Renamings between the versions of transformers and peft that we support; nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    try:
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:  # Typer turns Ctrl-C into this code and says nothing
            _complain(
                "interrupted. A training run that saved checkpoints goes on with --resume, a conversion or a "
                "verify-equivalence --work with the same command."
            )
    except UserError as error:
        code = _complain(str(error), error.exit_code)
    except OSError as error:
        code = _complain(
            f"{error.filename or 'system'}: {error.strerror or error}. Check the path and its permissions."
        )
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            code = _complain(f"memory ran out ({str(error).splitlines()[0][:120] if str(error) else 'RAM'}). {SMALLER}")
        elif hasattr(error, "format_message"):  # what Typer raises for wrong flags
            code = _complain(f"{error.format_message()} See qwen2tool --help.")
        else:
            raise
    sys.exit(code if isinstance(code, int) else 0)


def _complain(text: str, code: int = EXIT_UNUSABLE) -> int:
    from qwen2tool.console import complain

    complain(text)
    return code


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qwen2tool {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (inspect, routes, train, merge, convert, verify_equivalence, push, demo):
    app.command()(command)
