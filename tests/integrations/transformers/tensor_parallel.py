"""One process of a tensor parallel attachment: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them.

Usage: python -m tests.integrations.transformers.tensor_parallel FOLDER, which holds models. Writes
FOLDER/MODEL.RANK.npz.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from kascade_cli import attach
from kascade_cli.errors import KascadeError
from kascade_cli.models import attention_modules, describe
from kascade_cli.partition import Partition, partition_of
from kascade_cli.schema import Budget, Profile
from tests.capture.tensor_parallel import load_split

from .naive import some_profile
from .test_attach import ids_of, run

RATIO, MIN_KEYS, WORLD = 0.15, 3, 2
SEGMENTS = [(0, 70), (70, 71), (71, 72), (72, 73), (73, 80), (80, 81)]
SPECS = [
    "dense", "kascade", "kascade-pooled", "kascade-refresh:refresh=3", "kascade-reused-norm", "oracle",
    "oracle-per-query", "omnikv:filter_layers=0+2", "lessismore:selection_layers=0+2", "quest", "streaming-llm",
]  # fmt: skip


def profiles(info):
    """Head maps that cross processes: of one anchor, of an anchor whose neighbour is one too (so that no layer reads
    it), of several anchors a layer; and such that stay within a process, one kind of each."""
    size = info.kv_heads // WORLD
    within = [head // size * size + (head + 1) % size for head in range(info.kv_heads)]
    options = {"model": info.card, "profiled_layers": info.profiled_layers, "budget": Budget(ratio=RATIO, min_keys=3)}
    last = info.profiled_layers[-1]
    return {
        "within": Profile.build(anchors=[0, 1], head_maps=dict.fromkeys(range(2, last + 1), within), **options),
        "within pairs": Profile.build(
            anchors=[0, 1],
            head_maps={
                layer: [(head % 2, other) for head, other in enumerate(within)] for layer in range(2, last + 1)
            },
            **options,
        ),
        "one": some_profile(info, anchors=[0, 2], ratio=RATIO, min_keys=MIN_KEYS),
        "neighbours": some_profile(info, anchors=[0, 1], ratio=RATIO, min_keys=MIN_KEYS),
        "pairs": some_profile(info, anchors=[0, 1, 2], pairs=True, ratio=RATIO, min_keys=MIN_KEYS),
    }


def crossed(*_):
    raise AssertionError("heads read their own process's keys, and something was gathered all the same")


def measure(model) -> dict[str, np.ndarray]:
    """Logits and keys read, of every strategy and profile."""
    found, ids = {}, ids_of(81, seed=5)
    for name, profile in profiles(describe(model, "tiny")).items():
        for spec in SPECS:
            if name != "one" and spec not in ("kascade", *SPECS[3:5]):
                continue
            if "within" in name and partition_of(attention_modules(model)[0]):
                before = Partition.gather
                Partition.gather = crossed
            with attach(model, profile, strategy=spec, ratio=RATIO, min_keys=MIN_KEYS) as attachment:
                found[f"{name} {spec}"] = run(model, ids, SEGMENTS).numpy()
                report = attachment.report()
                found[f"{name} {spec} read"] = np.array([report["keys_read"], report["keys_visible"]])
            if Partition.gather is crossed:
                Partition.gather = before
    return found


def refused(model) -> str:
    """What is said where this process holds other heads than it should."""
    attachment = attach(model, strategy="oracle")
    object.__setattr__(attachment.partition, "world", 2 * WORLD)
    try:
        with torch.no_grad():
            model(torch.tensor([ids_of(20)]))
    except KascadeError as error:
        return str(error)
    finally:
        attachment.detach()
    return "nothing"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        model = load_split(path, WORLD)
        found = measure(model)
        np.savez(f"{path}.{os.environ['RANK']}.npz", refused=np.array(refused(model)), **found)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
