"""The command `lenskit`: argument parsing only."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
from rich.console import Console
from rich.table import Table

from lenskit import commands, extraction
from lenskit import demo as demonstration
from lenskit.checkpoints import write
from lenskit.checkpoints.load import describe
from lenskit.checkpoints.source import embedded_names, find
from lenskit.checkpoints.well_known import well_known
from lenskit.errors import LenskitError
from lenskit.extras import load
from lenskit.models.registry import MODULES, family
from lenskit.version import __version__

P = ParamSpec("P")

app = typer.Typer(
    help="Transformers rewritten to be read, with every activation a named hook point.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, and a hub token is one
)


def told_plainly(command: Callable[P, None]) -> Callable[P, None]:
    """The command, but what goes wrong is a message and an exit status; only our own bugs are tracebacks."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            raise  # whoever read our output has gone: typer's affair
        except (LenskitError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            for note in getattr(interrupt, "__notes__", ()):  # such as what became of a job on a server
                typer.echo(note, err=True)
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from interrupt

    return wrapped


Remote = Annotated[
    str | None,
    typer.Option(help="Run it on the server at this URL. The API key is LENSKIT_API_KEY, or in the settings' file."),
]
Source = Annotated[str, typer.Argument(help="An embedded name, a folder, or a Hugging Face hub id.")]
Dest = Annotated[Path, typer.Argument(help="A folder that is not there yet, or is empty.")]
Revision = Annotated[str | None, typer.Option(help="The hub's branch, tag or commit.")]
Token = Annotated[
    str | None, typer.Option(help="For private or gated repositories; HF_TOKEN in the environment is read too.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lenskit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What the command takes before a subcommand."""


@app.command()
@told_plainly
def demo(out: Annotated[Path, typer.Option(help="The page's file.")] = demonstration.PAGE) -> None:
    """Look inside a small model that ships with lenskit; writes a page with pictures, too."""
    demonstration.run(out)


@app.command()
@told_plainly
def convert(source: Source, dest: Dest, revision: Revision = None, token: Token = None) -> None:
    """Write a checkpoint in lenskit's own format, which loads by memory map."""
    typer.echo(f"wrote {write.convert(source, dest, revision=revision, token=token)}")


@app.command()
@told_plainly
def export(source: Source, dest: Dest, revision: Revision = None, token: Token = None) -> None:
    """Write a checkpoint in Hugging Face's format."""
    typer.echo(f"wrote {write.export(source, dest, revision=revision, token=token)}")


@app.command()
@told_plainly
def generate(
    source: Source,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to continue. In a pipe, or for -, lines of standard input."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Steps at most; a row ends earlier at its end token.")] = 20,
    plan: Annotated[Path | None, typer.Option(help="Interventions: a file that Plan.save wrote.")] = None,
    save: Annotated[
        list[str] | None, typer.Option(help="A hook point or glob to save at every step; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A .safetensors file for what is saved.")] = None,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Draw tokens instead of taking the likeliest.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits, with --do-sample.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
    remote: Remote = None,
) -> None:
    """Continue prompts, with interventions from a plan."""
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    commands.generate(
        source, prompts or (), plan=plan, save=save or (), out=out, as_json=as_json, options=options, remote=remote
    )


@app.command()
@told_plainly
def extract(
    source: Source,
    prompts: Annotated[
        Path, typer.Option(help='JSON lines: texts, {"prompt": text} or {"messages": [...]}; or a .txt file of lines.')
    ],
    out: Annotated[Path, typer.Option(help="The folder; the same command goes on with it after a kill.")],
    at: Annotated[
        list[str] | None,
        typer.Option(help=f"A hook point or glob whose states are kept; repeatable. {extraction.LAST} if left out."),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Of which tokens: a number, a slice such as 0:5, or all.")] = "-1",
    steps: Annotated[str, typer.Option(help="Of which steps; 0 is the prompt, k new token k.")] = "0",
    system: Annotated[str | None, typer.Option(help="A system message for each prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Take texts as a user's messages, without a system's.")] = False,
    generation_prompt: Annotated[bool, typer.Option(help="Let the chat template open the answer.")] = True,
    stacked: Annotated[
        bool, typer.Option("--stacked", help="All states in one file, at the end, a row a prompt.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Steps at most; a text ends earlier at its end token.")] = 20,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Draw tokens instead of taking the likeliest.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits, with --do-sample.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random numbers; each prompt has its own of it.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Of the weights; the checkpoint's own if left out.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the weights go.")] = None,
    device_map: Annotated[str | None, typer.Option(help="auto: spread them over the devices that there are.")] = None,
    revision: Revision = None,
    token: Token = None,
    remote: Remote = None,
) -> None:
    """Continue each prompt of a file alone; keep the texts, and hidden states, in a folder."""
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    job = extraction.Job(
        source=source,
        prompts=prompts,
        out=out,
        at=at or [extraction.LAST],
        tokens=tokens,
        steps=steps,
        system=system,
        chat=chat,
        generation_prompt=generation_prompt,
        stacked=stacked,
        options=options,
        revision=revision,
        token=token,
        device=device,
        device_map=device_map,
        dtype=dtype,
        remote=remote,
    )
    typer.echo(extraction.extract(job))


Folder = Annotated[
    Path | None, typer.Option(help="Of the database and the results; ~/.local/share/lenskit/server if left out.")
]
Database = Annotated[str | None, typer.Option(help="Of jobs and keys: an SQLAlchemy URL; SQLite in the folder.")]


@app.command()
@told_plainly
def serve(
    models: Annotated[list[str] | None, typer.Argument(help="Names, folders or hub ids; or NAME=SOURCE.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file; see docs/server.md.")] = None,
    host: Annotated[str | None, typer.Option(help="127.0.0.1 if left out: this machine only.")] = None,
    port: Annotated[int | None, typer.Option(help="8000 if left out.")] = None,
    folder: Folder = None,
    database: Database = None,
    no_keys: Annotated[bool, typer.Option("--no-keys", help="Let everybody on this machine in.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="On a Ray cluster: several machines, autoscaling.")] = False,
) -> None:
    """Serve models over HTTP: interventions come as data, nobody's code is run."""
    load("lenskit.server.command", extra="server").serve(
        models or (),
        config=config,
        host=host,
        port=port,
        folder=folder,
        database=database,
        use_keys=False if no_keys else None,
        elsewhere=load("lenskit.server.on_ray", extra="ray").run if ray else None,
    )


keys = typer.Typer(help="The API keys of a server.", no_args_is_help=True)
app.add_typer(keys, name="keys")


@keys.command("add")
@told_plainly
def add_key(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    limit: Annotated[
        list[str] | None,
        typer.Option(help="queued_jobs=N, tokens_per_minute=N or result_bytes=N; repeatable. Else the server's."),
    ] = None,
    folder: Folder = None,
    database: Database = None,
) -> None:
    """Make a key; it is printed now and never again."""
    load("lenskit.server.command", extra="server").add_key(name, limits=limit or (), folder=folder, database=database)


@keys.command("remove")
@told_plainly
def remove_key(
    name: Annotated[str, typer.Argument(help="Whose it is.")], folder: Folder = None, database: Database = None
) -> None:
    """Remove a key."""
    load("lenskit.server.command", extra="server").remove_key(name, folder=folder, database=database)


@keys.command("list")
@told_plainly
def list_keys(folder: Folder = None, database: Database = None) -> None:
    """Names and limits; the keys themselves are nowhere."""
    load("lenskit.server.command", extra="server").list_keys(folder=folder, database=database)


@app.command()
@told_plainly
def models() -> None:
    """List the architecture families with well-known checkpoints, and the checkpoints that ship with lenskit."""
    families = Table("family", "Hugging Face's class", "well-known checkpoints", box=None, header_style="dim")
    for model_type in sorted(MODULES):
        found = family(model_type, where="the registry")
        families.add_row(model_type, found.hf_class, "\n".join(well_known(model_type)))
    embedded = Table("embedded checkpoint", "family", "layers", "heads", "d_model", box=None, header_style="dim")
    for name in embedded_names():
        cfg = describe(find(name)).cfg
        embedded.add_row(name, cfg.model_type, str(cfg.n_layers), str(cfg.n_heads), str(cfg.d_model))
    console = Console()
    console.print(families, "", embedded, "")
    console.print("Others of these families load as well: the model_type in a checkpoint's config.json decides.")
