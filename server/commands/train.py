"""`hope train`: make a native HOPE from text, with progress, checkpoints and exact restart."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from server.commands.terminal import Refusal, err, out, refusals
from server.commands.train_memory import memory

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from hope_runtime.config import HopeConfig
    from hope_runtime.tokenizer import Tokenizer
    from hope_runtime.training import loop
    from hope_runtime.training.data import Corpus, Data

train = typer.Typer(help="Train models.", no_args_is_help=True)
_SAVE_EVERY = 200  # steps
_LOOK_EVERY = 100  # steps between two looks at what is kept to judge by
_NOTE_EVERY = 25  # steps between two lines of the curve


@train.callback()
def _train() -> None:
    """Train models."""


train.command()(memory)


@train.command()
def native(
    data: Annotated[
        list[Path],
        typer.Argument(help=".txt files, .jsonl chats, or folders of chats (see docs/training.md)"),
    ],
    to: Annotated[Path, typer.Option("--out", help="directory of the model; a run there goes on")],
    steps: Annotated[int, typer.Option(help="optimiser steps of the whole run")] = 3200,
    tokens: Annotated[int, typer.Option(help="tokens a step")] = 4096,
    length: Annotated[int, typer.Option(help="tokens of a row of text")] = 512,
    personas: Annotated[
        bool, typer.Option(help="mix chats with facts that are told and asked for later")
    ] = True,
    width: Annotated[int, typer.Option(help="of the residual stream")] = 256,
    blocks: Annotated[int, typer.Option(help="blocks")] = 4,
    mixers: Annotated[
        str, typer.Option(help="memory, attention, or one of the two a block, with commas")
    ] = "memory",
    heads: Annotated[int, typer.Option(help="heads of a memory, and of attention")] = 4,
    head_width: Annotated[int, typer.Option(help="width of a head")] = 64,
    hidden: Annotated[int, typer.Option(help="inner width of an MLP")] = 384,
    chain: Annotated[int, typer.Option(help="MLPs a block")] = 2,
    chunk: Annotated[int, typer.Option(help="tokens of a memory's chunk")] = 32,
    vocabulary: Annotated[int, typer.Option(help="tokens to learn, if no --tokenizer")] = 3072,
    tokenizer: Annotated[
        Path | None, typer.Option(help="directory with a tokenizer of an earlier hope train")
    ] = None,
    optimiser: Annotated[str, typer.Option(help="of matrices: muon, m3, adamw, ...")] = "muon",
    rate: Annotated[float | None, typer.Option(help="of matrices; its default suits")] = None,
    vector_rate: Annotated[float, typer.Option(help="of all else, by AdamW")] = 3e-3,
    unroll: Annotated[
        bool, typer.Option(help="second order: through what memory did to its projections")
    ] = False,
    levels: Annotated[
        bool, typer.Option("--levels", help="let slow levels learn while rows are read (slower)")
    ] = False,
    seed: Annotated[int, typer.Option(help="of weights and batches")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all cores")] = 0,
) -> None:
    """Train a native HOPE; Ctrl-C keeps what was done, and the same command goes on from there."""
    asked = {name: value for name, value in locals().items() if name not in {"data", "to"}}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with refusals():
        try:
            _native(data, to, asked)
        except ValueError as error:  # all errors of training that a person can mend
            raise Refusal(str(error)) from error


def _native(paths: list[Path], to: Path, asked: dict[str, Any]) -> None:
    import torch

    from hope_runtime.training import data, loop
    from server.loading import choose_device, choose_dtype

    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    device = choose_device(asked["device"])
    dtype = choose_dtype(asked["dtype"], device)
    recipe = _recipe(asked)
    _config(asked, 1)  # what cannot be is told before anything is read
    with err.status("reading the data"):
        corpus = data.read(paths)
        reader = _tokenizer(to, corpus, asked)
        ready = data.prepare(
            corpus,
            reader,
            tokens=asked["tokens"],
            length=asked["length"],
            personas=asked["personas"],
        )
    config = _config(asked, reader.vocabulary)
    file = to / "run.safetensors"
    if file.exists():
        config, recipe, progress = _continued(file, config, recipe)
    else:
        progress = loop.begin(config, recipe)
    count = sum(p.numel() for p in progress.params.values())
    out.print(
        f"[bold]{to.name}[/bold]: {count / 1e6:.2f} M parameters, {config.blocks} blocks, "
        f"{len(corpus.chats.train):,} chats and {len(corpus.texts)} texts; "
        f"{dtype} on {device.type}".replace("torch.", "")
    )
    progress = _run(to, config, recipe, progress, ready, device, dtype)
    _write(to, config, progress, asked["length"])
    out.print(f"done: serve it with  hope serve --model {to}")


def _run(
    to: Path,
    config: HopeConfig,
    recipe: loop.Recipe,
    progress: loop.Progress,
    data: Data,
    device: Any,
    dtype: Any,
) -> loop.Progress:
    """Step to the end of the run, or to Ctrl-C; either way what was done is kept."""
    from hope_runtime.training import loop

    file = to / "run.safetensors"
    smooth: float | None = None
    began, read = time.monotonic(), 0
    with (
        _bar(recipe.steps, progress.step) as bar,
        (to / "curve.jsonl").open("a") as curve,
    ):
        try:
            while progress.step < recipe.steps:
                progress, did = loop.advance(
                    config, recipe, progress, data.source, device=device, dtype=dtype
                )
                smooth = did.loss if smooth is None else 0.98 * smooth + 0.02 * did.loss
                read += did.tokens
                seconds = time.monotonic() - began
                bar.update(
                    bar.task_ids[0],
                    completed=progress.step,
                    loss=f"{smooth:.3f}",
                    speed=f"{read / seconds:,.0f}",
                )
                if did.step % _NOTE_EVERY == 0 or progress.step == recipe.steps:
                    note: dict[str, Any] = {
                        "step": did.step,
                        "loss": round(smooth, 4),
                        "norm": round(did.norm, 3),
                        "tokens_a_second": round(read / seconds),
                    }
                    if did.step % _LOOK_EVERY == 0 or progress.step == recipe.steps:
                        note["kept"] = round(
                            loop.judged(config, progress.params, data.kept, device, dtype), 4
                        )
                    curve.write(json.dumps(note) + "\n")
                    curve.flush()
                if progress.step % _SAVE_EVERY == 0:
                    loop.save(file, config, recipe, progress)
        except KeyboardInterrupt:
            loop.save(file, config, recipe, progress)
            err.print(f"stopped at step {progress.step}; the same command goes on from there")
            raise typer.Exit(130) from None
    loop.save(file, config, recipe, progress)
    return progress


def _bar(steps: int, done: int) -> Progress:
    bar = Progress(
        TextColumn("{task.completed}/{task.total} steps"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
        console=err,
    )
    bar.add_task("", total=steps, completed=done, loss="-", speed="-")
    return bar


def _tokenizer(to: Path, corpus: Corpus, asked: dict[str, Any]) -> Tokenizer:
    """Read the run's own tokenizer, or the one asked for, or learn one; the run keeps it."""
    from hope_runtime.training.vocabulary import (
        require_layout,
        save_vocabulary,
        train_vocabulary,
    )
    from hope_runtime.weights.huggingface_tokenizer import directory_tokenizer
    from hope_runtime.weights.json_file import Fields

    def kept(path: Path) -> Tokenizer:
        return directory_tokenizer(path, Fields.read_if_there(path / "config.json"), 1 << 30)

    if (to / "tokenizer.json").exists():
        return kept(to)
    if given := asked["tokenizer"]:
        learned = kept(given)
        require_layout(learned)
    else:
        learned = train_vocabulary(
            corpus.chats.train, corpus.texts, asked["vocabulary"], asked["seed"]
        )
    save_vocabulary(learned, to)
    return learned


def _recipe(asked: dict[str, Any]) -> loop.Recipe:
    from hope_runtime.ops import optimisers
    from hope_runtime.training import loop

    optimisers.named(asked["optimiser"])
    rates = {"muon": 0.02, "m3": 1e-5, "adamw": 3e-3}
    rate = asked["rate"]
    if rate is None:
        if asked["optimiser"] not in rates:
            raise Refusal(f"--optimiser {asked['optimiser']!r} has no default rate; give --rate")
        rate = rates[asked["optimiser"]]
    return loop.Recipe(
        steps=asked["steps"],
        optimiser=asked["optimiser"],
        rate=rate,
        vector_rate=asked["vector_rate"],
        unroll=asked["unroll"],
        levels=asked["levels"],
        seed=asked["seed"],
    )


def _config(asked: dict[str, Any], vocabulary: int) -> HopeConfig:
    from hope_runtime.config import HopeConfig, MemoryConfig, Mixer, Rule

    names = asked["mixers"].split(",")
    unknown = sorted({*names} - {*Mixer})
    if unknown:
        raise Refusal(f"--mixers {unknown[0]!r} is none; known are {', '.join(Mixer)}")
    each = tuple(Mixer(name) for name in (names if len(names) > 1 else names * asked["blocks"]))
    attends = Mixer.ATTENTION in each
    config = HopeConfig(
        vocabulary=vocabulary,
        width=asked["width"],
        blocks=asked["blocks"],
        heads=asked["heads"] if attends else 0,
        key_heads=asked["heads"] if attends else 0,
        head_width=asked["head_width"] if attends else 0,
        hidden=asked["hidden"],
        norm_eps=1e-5,
        rotary_base=10000.0,
        sinks=4 if attends else 0,
        mixers=each,
        memory=MemoryConfig(asked["heads"], asked["head_width"], rule=Rule(chunk=asked["chunk"])),
        chain=asked["chain"],
    )
    return config.native() if asked["levels"] else config


def _continued(
    file: Path, config: HopeConfig, recipe: loop.Recipe
) -> tuple[HopeConfig, loop.Recipe, loop.Progress]:
    """Go on with a run, which must be the one that was asked for."""
    from hope_runtime.training import loop

    found, was, progress = loop.load(file)
    if found != config:
        raise Refusal(f"{file} is a run of another shape; choose another --out, or remove it")
    if replace(was, steps=recipe.steps) != recipe:
        raise Refusal(f"{file} is a run with another recipe; choose another --out, or remove it")
    if recipe.steps < progress.step:
        raise Refusal(f"{file} is at step {progress.step} already, beyond --steps {recipe.steps}")
    err.print(f"going on from step {progress.step} of {file}")
    return found, recipe, progress


def _write(to: Path, config: HopeConfig, progress: loop.Progress, length: int) -> None:
    from hope_runtime.weights.native import write_native

    served = config if config.levels else config.native()
    write_native(to, served, progress.params, context=length)
