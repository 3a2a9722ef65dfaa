"""Saves a trained model the way the package ships it: bfloat16 safetensors, config, word-level tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from recipes import Recipe

from kascade_cli.tasks import vocabulary as voc


def build_tokenizer(max_length: int) -> Any:
    """Words split at white space, `<bos>` in front, left padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(voc.WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", voc.BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def scale_queries(model: Any, factor: float) -> None:
    """Multiplies every q_proj by `factor`: softer attention, for models without a norm on the queries."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(factor)


def export_model(model: Any, folder: Path, recipe: Recipe) -> None:
    """Writes the folder beside and renames it, replacing an older one. Scales and casts `model` in place."""
    if recipe.query_scale != 1:
        scale_queries(model, recipe.query_scale)
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.eval().to(torch.bfloat16).save_pretrained(beside)
    build_tokenizer(model.config.max_position_embeddings).save_pretrained(beside)
    # transformers 5 writes a class name of its own; this one is read by every version.
    path = beside / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
