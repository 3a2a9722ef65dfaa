"""Trains the demo models: seeded, resumable, on the CPU or one GPU.

    python training/train.py --model 16l --out out-16l             # 7.6 minutes on one large GPU
    python training/train.py --model 8l --out out-8l               # 46 minutes on two CPU cores
    python training/train.py --model 8l --out out-8l --resume      # after any interruption

Writes OUT/checkpoint.pt while training, and at the end OUT/model (bfloat16 safetensors, tokenizer, config)
and OUT/train.json (what ran, and the accuracies on the way).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from batches import KINDS, BatchSource, mixed_size
from export import export_model
from recipes import RECIPES, Recipe
from torch import nn

from kascade_cli import console, files
from kascade_cli.errors import KascadeError, UsageError

CHECK_EVERY = 10  # steps between accuracy checks, which may end a stage
LOG_SECONDS = 15.0


@dataclass
class State:
    """Where the run stands. `seconds`: over all resumes; stage == len(stages): mixed lengths."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stage: int = 0
    accuracy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    log: list[dict[str, Any]] = field(default_factory=list)


def build_model(recipe: Recipe, seed: int) -> nn.Module:
    """A causal LM of normal weights: embeddings .02, matrices .8 / sqrt(fan in), half that before a sum."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[recipe.architecture]
    model = model_class(config_class(**recipe.config))
    model.set_attn_implementation("sdpa")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            into_residual = "o_proj" in name or "down_proj" in name
            std = 0.02 if "embed" in name else 0.8 * parameter.shape[1] ** -0.5 * (0.5 if into_residual else 1.0)
            nn.init.normal_(parameter, std=std)
    return model


def build_optimisers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (update times sqrt(max(1, rows / columns))) on hidden matrices, AdamW on embeddings and norms."""
    named = list(model.named_parameters())
    hidden = [p for n, p in named if p.dim() == 2 and "embed" not in n]
    embeddings = [p for n, p in named if p.dim() == 2 and "embed" in n]
    vectors = [p for n, p in named if p.dim() != 2]
    groups = [
        {"params": embeddings, "weight_decay": recipe.embedding_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(
            hidden,
            lr=recipe.muon_lr,
            momentum=0.95,
            nesterov=True,
            weight_decay=0.01,
            adjust_lr_fn="original",
        ),
        torch.optim.AdamW(groups, lr=recipe.adamw_lr, betas=(0.9, 0.98)),
    ]


def rate(recipe: Recipe, step: int, fraction: float) -> float:
    """Learning rate over its peak: linear warm-up, constant, linear decay at the end."""
    decay = 1.0 if fraction < 1 - recipe.decay else max(recipe.floor, (1 - fraction) / recipe.decay)
    return min(1.0, (step + 1) / recipe.warmup) * decay


def update_curriculum(state: State, recipe: Recipe, fraction: float) -> None:
    """Moves to the next stage when the running accuracies are high enough."""
    if state.stage == len(recipe.stages):
        return
    wanted = recipe.first_stage if state.stage == 0 and recipe.first_stage else recipe.advance
    if fraction >= recipe.patience:
        wanted = {"single-hop": wanted["single-hop"]}
    if all(state.accuracy[kind] > least for kind, least in wanted.items()):
        state.stage += 1
        for kind in ("single-hop", "two-hop", "copy"):
            state.accuracy[kind] = min(state.accuracy[kind], 0.5)


def step_size(seed: int, state: State, recipe: Recipe, ahead: int) -> tuple[int, int, int]:
    """(step, tokens, sequences) of the step `ahead` steps from now if no stage ends before."""
    step = state.step + ahead
    if state.stage < len(recipe.stages):
        return step, *recipe.stages[state.stage]
    return step, *mixed_size(seed, step, recipe.mixed)


def train_step(
    model: Any,
    optimisers: list[torch.optim.Optimizer],
    batch: tuple,
    state: State,
    recipe: Recipe,
    factor: float,
) -> float:
    """One optimiser step; returns the loss. Logits are computed only where the target carries weight."""
    device = model.device
    ids, weights, kinds = (torch.from_numpy(part).to(device, non_blocking=True) for part in batch)
    weights, kinds, targets = weights[:, 1:], kinds[:, 1:], ids[:, 1:].long()
    for optimiser, peak in zip(optimisers, (recipe.muon_lr, recipe.adamw_lr), strict=True):
        for group in optimiser.param_groups:
            group["lr"] = peak * factor
    chosen = weights > 0
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1].long(), use_cache=False).last_hidden_state
        logits = F.linear(hidden[chosen], model.model.embed_tokens.weight)
    weight = weights[chosen].float() / 10
    loss = (F.cross_entropy(logits.float(), targets[chosen], reduction="none") * weight).sum() / weight.sum()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    if state.step % CHECK_EVERY == CHECK_EVERY - 1:
        right = (logits.argmax(-1) == targets[chosen]).float()
        for kind, code in KINDS.items():
            of_kind = (kinds[chosen] == code) & (weight > 0.5)
            if of_kind.any():
                state.accuracy[kind] = 0.7 * state.accuracy[kind] + 0.3 * right[of_kind].mean().item()
    state.step += 1
    state.tokens += ids.numel()
    return loss.item()


def save_checkpoint(path: Path, model: nn.Module, optimisers: list, state: State, options: dict) -> None:
    """Writes beside and renames: a kill leaves the old checkpoint or the new one."""
    beside = path.with_suffix(".tmp")
    torch.save(
        {
            "model": model.state_dict(),
            "optimisers": [o.state_dict() for o in optimisers],
            "state": vars(state),
            "options": options,
        },
        beside,
    )
    os.replace(beside, path)


def load_checkpoint(path: Path, model: nn.Module, optimisers: list, options: dict) -> State:
    """Restores weights, optimiser state and position. Raises UsageError when the run was another one."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in options.items():
        if saved["options"][name] != value:
            raise UsageError(f"{path} was made with --{name} {saved['options'][name]}, not {value}")
    model.load_state_dict(saved["model"])
    for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
        optimiser.load_state_dict(state)
    return State(**saved["state"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RECIPES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and the result")
    parser.add_argument("--minutes", type=float, help="training time (default: the recipe's)")
    parser.add_argument("--steps", type=int, help="optimiser steps instead of minutes: fully reproducible on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--workers", type=int, help="data processes (default: cores - 1, at most 14)")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt if it is there")
    options = parser.parse_args(arguments)
    if options.workers is None:
        options.workers = min(14, max(1, len(os.sched_getaffinity(0)) - 1))
    if options.minutes is None:
        options.minutes = RECIPES[options.model].minutes
    if (options.steps or options.minutes) <= 0:
        raise UsageError("the length of the run must be above 0")
    return options


def train(options: argparse.Namespace, source: BatchSource) -> tuple[nn.Module, State]:
    """Runs to the end of the budget, from OUT/checkpoint.pt where there is one."""
    recipe = RECIPES[options.model]
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device
    model = build_model(recipe, options.seed).to("cpu" if device == "auto" else device).train()
    optimisers = build_optimisers(model, recipe)
    checkpoint = options.out / "checkpoint.pt"
    identity = {"model": options.model, "seed": options.seed, "steps": options.steps}
    state = State()
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, model, optimisers, identity)
        console.err.print(f"resumed at step {state.step}, {state.seconds / 60:.1f} min")

    def fraction() -> float:
        return state.step / options.steps if options.steps else state.seconds / 60 / options.minutes

    last_log = last_save = began = time.monotonic()
    earlier = state.seconds
    with console.progress(f"training {options.model}", total=100) as bar:
        while (done := fraction()) < 1:
            ahead = 2 * options.workers + 1
            batch = source.get([step_size(options.seed, state, recipe, i) for i in range(ahead)])
            loss = train_step(model, optimisers, batch, state, recipe, rate(recipe, state.step, done))
            if state.step % CHECK_EVERY == 0:
                update_curriculum(state, recipe, done)
            now = time.monotonic()
            state.seconds = earlier + now - began
            if now - last_log > LOG_SECONDS or fraction() >= 1:
                row = describe(state, recipe, loss)
                state.log.append(row)
                last_log = now
                if not console.err.is_terminal:
                    console.err.print(json.dumps(row), soft_wrap=True)
            if now - last_save > options.checkpoint_seconds or fraction() >= 1:
                save_checkpoint(checkpoint, model, optimisers, state, identity)
                last_save = now
            text = f"step {state.step}, stage {state.stage}, loss {loss:.2f}, single-hop "
            bar.update(
                bar.first,
                completed=round(100 * fraction(), 1),
                description=f"{text}{state.accuracy['single-hop']:.2f}",
            )
    return model, state


def describe(state: State, recipe: Recipe, loss: float) -> dict[str, Any]:
    """One row of the training log."""
    stage = f"{recipe.stages[state.stage][0]}" if state.stage < len(recipe.stages) else "mixed"
    accuracy = {kind: round(value, 3) for kind, value in state.accuracy.items()}
    return {
        "minutes": round(state.seconds / 60, 2),
        "step": state.step,
        "mega_tokens": round(state.tokens / 1e6, 2),
        "stage": stage,
        "loss": round(loss, 3),
        **accuracy,
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = RECIPES[options.model]
    if (options.out / "checkpoint.pt").exists() and not options.resume:
        raise UsageError(f"{options.out} holds a run already; go on with --resume or choose another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    with BatchSource(options.seed, recipe.layout, options.workers) as source:
        model, state = train(options, source)
    export_model(model, options.out / "model", recipe)
    cuda = model.device.type == "cuda"
    record = {
        "recipe": options.model,
        "seed": options.seed,
        "steps": state.step,
        "tokens": state.tokens,
        "minutes": round(state.seconds / 60, 2),
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "log": state.log,
    }
    files.atomic_write(options.out / "train.json", json.dumps(record, indent=1) + "\n")
    result = options.out / "model"
    console.err.print(f"wrote {result}; score it with: python benchmarks/dense_scores.py {result}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except KascadeError as error:
        sys.exit(f"error: {error}")
