"""`hope train memory`: a memory layer for a pre-trained model, with progress and exact restart."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from server.commands.terminal import Refusal, err, out, refusals, settings_from

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from hope_runtime.config import RecallConfig
    from hope_runtime.layers import recall
    from hope_runtime.model import Hope
    from hope_runtime.tokenizer import Tokenizer
    from hope_runtime.training.told import Kind, learn
    from hope_runtime.training.told.drawing import Pool

_KEPT = 8  # kinds with something to judge by; fewer say nothing
_SAVE_EVERY = 50  # steps
_LOOK_EVERY = 200  # steps between two looks at facts that are kept from training


def memory(
    to: Annotated[Path, typer.Option("--out", help="directory of the layer; a run there goes on")],
    base: Annotated[str, typer.Option(help="the model, as `hope serve` takes it")] = "smollm2",
    data: Annotated[
        Path | None,
        typer.Option(help="chats to be said in between (docs/training.md); none: a hundred"),
    ] = None,
    kinds: Annotated[
        list[Path] | None,
        typer.Option(help="kinds of facts (.toml) in place of those that come with it; again"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps of the whole run")] = 4000,
    rounds: Annotated[int, typer.Option(min=1, help="times each phrasing is read by the base")] = 1,
    sessions: Annotated[int, typer.Option(min=1, help="sessions a step")] = 16,
    rate: Annotated[float, typer.Option(help="of AdamW")] = 1.5e-3,
    seed: Annotated[int, typer.Option(min=0, help="of all that is drawn")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="of the base: auto, float32 or bfloat16")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores")] = 0,
) -> None:
    """Teach a frozen model to remember what it is told.

    The base reads every phrasing once, which is kept in the directory; then only the layer is
    trained. Ctrl-C keeps what was done, and the same command goes on from there.
    """
    asked = {name: value for name, value in locals().items() if name != "to"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with refusals():
        try:
            _memory(to, asked)
        except ValueError as error:  # all errors of training that a person can mend
            raise Refusal(str(error)) from error
        except KeyboardInterrupt:
            err.print("stopped; the same command goes on from there")
            raise typer.Exit(130) from None


def _memory(to: Path, asked: dict[str, Any]) -> None:
    from hope_runtime.training import told
    from hope_runtime.training.corpora import read_chats
    from hope_runtime.training.told import learn
    from hope_runtime.training.told.judging import calibrated
    from hope_runtime.weights.memory_layer import FILE, write_layer
    from server.loading import load, shipped

    settings = settings_from(
        model=asked["base"],
        memory_layer="none",
        lanes=1,
        device=asked["device"],
        dtype=asked["dtype"],
        threads=asked["threads"],
    )
    with err.status(f"reading {asked['base']}"):
        card, model, tokenizer, _ = load(settings, lambda said: None)
    if not model.config.attention_blocks or model.config.memory_blocks:
        raise Refusal(f"--base {asked['base']}: its blocks remember by themselves")
    known = told.read(asked["kinds"]) if asked["kinds"] else told.kinds()
    found = read_chats(asked["data"] or shipped("hope-nano") / "chats.jsonl")
    chats = found.train or found.valid
    to.mkdir(parents=True, exist_ok=True)
    recipe = learn.Recipe(
        steps=asked["steps"], sessions=asked["sessions"], rate=asked["rate"], seed=asked["seed"]
    )
    config, layer, pools = _pools(to, asked, model, tokenizer, known, chats)
    embedding = model.embedding.float()
    progress = _begun(to / "run.safetensors", config, recipe, layer)
    count = sum(p.numel() for p in progress.params.values())
    out.print(
        f"[bold]{card.name}[/bold]: a memory layer of {count / 1e6:.2f} M parameters, blocks "
        f"{config.taps[0]} and {config.taps[1]}; {len(known)} kinds of facts, "
        f"{len(pools[0].kinds)} of them trained on"
    )
    progress = _run(to, config, recipe, layer, progress, pools, embedding)
    weights = learn.trained(layer, progress)
    decoded = [tokenizer.decode([id]) for id in range(model.config.vocabulary)]
    config = calibrated(config, weights, pools[1], embedding, decoded)
    write_layer(to / FILE, card.fingerprint.partition("/")[0], config, weights)
    out.print(f"done: serve it with  hope serve --model {asked['base']} --memory-layer {to}")


def _pools(
    to: Path,
    asked: dict[str, Any],
    model: Hope,
    tokenizer: Tokenizer,
    kinds: Sequence[Kind],
    chats: Sequence[Any],
) -> tuple[RecallConfig, recall.Weights, tuple[Pool, Pool]]:
    """Let the base read everything that it has not read yet; return what is trained on and not."""
    from hope_runtime.layers import recall
    from hope_runtime.training.told import learn, prepare
    from hope_runtime.training.told.drawing import Pool
    from hope_runtime.training.told.features import Features

    config = prepare.config_for(model.config)
    base = prepare.seen_by(model, config)
    seed = asked["seed"]
    first = to / "first.safetensors"
    rounds = [prepare.shard(i, kinds, chats, tokenizer, seed) for i in range(asked["rounds"])]
    if first.exists():
        config, _, layer, _ = learn.load(first, model.device)
    else:
        with err.status("whitening"):
            made = prepare.first_layer(base, config, rounds[0], tokenizer, seed)
            layer = recall.Weights(*(tensor.to(model.device) for tensor in made))
        nothing = learn.Recipe(steps=1)
        learn.save(first, config, nothing, layer, learn.begin(layer, nothing))
    parts = []
    with _bar("reading", "tokens") as bar:
        task = bar.add_task("", total=sum(len(s.tokens) for said in rounds for s in said), note="")
        for i, said in enumerate(rounds):
            parts.append(
                prepare.gathered(
                    base,
                    layer,
                    said,
                    to / f"features-{i}.safetensors",
                    lambda tokens: bar.advance(task, tokens),
                ).on(model.device)
            )
            bar.update(task, completed=sum(len(s.tokens) for done in rounds[: i + 1] for s in done))
    features = Features.join(parts)
    written = learn.written_ids(layer, features.tokens.to(model.device)).cpu()
    rivals = learn.rivals(features.hidden, model.embedding.float()).cpu()
    ours = Pool(features, kinds, written, config, rivals, held_out=False)
    theirs = Pool(features, kinds, written, config, rivals, held_out=True)
    if not ours.kinds:
        raise Refusal("no fact can be told and asked for; give more kinds, or more values to each")
    if len(theirs.kinds) < _KEPT:
        err.print("so few kinds that too little is kept from training: they judge the layer, too")
        theirs = ours
    return config, layer, (ours, theirs)


def _begun(
    file: Path, config: RecallConfig, recipe: learn.Recipe, layer: recall.Weights
) -> learn.Progress:
    """Go on with the run in a file, which must be the one that was asked for; else begin."""
    from hope_runtime.training.told import learn

    if not file.exists():
        return learn.begin(layer, recipe)
    was, recipe_was, _, progress = learn.load(file, layer.mean.device)
    if was != config or replace(recipe_was, steps=recipe.steps) != recipe:
        raise Refusal(f"{file} is a run with another recipe; choose another --out, or remove it")
    if recipe.steps < progress.step:
        raise Refusal(f"{file} is at step {progress.step} already, beyond --steps {recipe.steps}")
    err.print(f"going on from step {progress.step}")
    return progress


def _run(
    to: Path,
    config: RecallConfig,
    recipe: learn.Recipe,
    layer: recall.Weights,
    progress: learn.Progress,
    pools: tuple[Pool, Pool],
    embedding: Any,
) -> learn.Progress:
    """Step to the end of the run, or to Ctrl-C; either way what was done is kept."""
    from hope_runtime.training.told import learn
    from hope_runtime.training.told.judging import judge

    file = to / "run.safetensors"
    near = learn.twins(embedding)
    mean: dict[str, float] = {}  # of the last steps
    began = time.monotonic()
    with _bar("training", "steps") as bar, (to / "curve.jsonl").open("a") as curve:
        task = bar.add_task("", total=recipe.steps, completed=progress.step, note="")
        try:
            while progress.step < recipe.steps:
                progress, seen = learn.advance(
                    config, recipe, layer, progress, pools[0], embedding, near
                )
                for name, value in zip(seen._fields, seen, strict=True):
                    if not math.isnan(value):
                        before = mean.get(name, value)
                        mean[name] = 0.95 * before + 0.05 * value
                doing = "copied" if "copied" in mean else "met"
                bar.update(task, completed=progress.step, note=f"{mean[doing]:.1%} {doing}")
                last = progress.step == recipe.steps
                if progress.step % _SAVE_EVERY == 0 or last:
                    learn.save(file, config, recipe, layer, progress)
                if progress.step % _LOOK_EVERY == 0 or last:
                    weights = learn.trained(layer, progress)
                    note = {
                        "step": progress.step,
                        **{name: round(value, 4) for name, value in mean.items()},
                        "seconds": round(time.monotonic() - began),
                        "held_out": asdict(judge(config, weights, pools[1], embedding, near)),
                    }
                    curve.write(json.dumps(note) + "\n")
                    curve.flush()
        except KeyboardInterrupt:
            learn.save(file, config, recipe, layer, progress)
            raise
    return progress


def _bar(what: str, unit: str) -> Progress:
    return Progress(
        TextColumn(f"{what} {{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=err,
    )
