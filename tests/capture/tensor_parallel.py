"""One process of a tensor parallel probe: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them.

Usage: python -m tests.capture.tensor_parallel FOLDER, which holds models. Writes FOLDER/MODEL.RANK.npz.
"""

import os
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from kascade_cli.capture.probe import Probe
from kascade_cli.capture.tiles import sample_tiles
from kascade_cli.models import attention_modules, describe
from kascade_cli.partition import partition_of

TOKENS = [3 + (index * 37) % 91 for index in range(70)]
TILES = sample_tiles(len(TOKENS), 12, tile=32, seed=3, prompt=0)


def measure(model) -> dict[str, np.ndarray]:
    """What a probe sees of TOKENS and 3 generated tokens, and the model's fingerprint."""
    info, seen = describe(model, "tiny"), {}
    with Probe(model, info) as probe:
        found = probe.run(
            TOKENS, TILES, lambda layer, first, mass: seen.update({f"{layer}.{first}": mass}), decode_tokens=3
        )
    return seen | {
        "importance": found.importance,
        "top_mass": found.top_mass,
        "generated": np.array(found.generated),
        "fingerprint": np.array(info.fingerprint),
    }


def load_split(folder: Path, world: int):
    """The model with its heads split by transformers, as `from_pretrained` does it (which needs accelerate)."""
    config = DistributedConfig(tp_plan="auto", tp_size=world)
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if find_spec("accelerate"):
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **options).eval()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # tied again when it is cut
    apply_tensor_parallelism(model, mesh, model._resolve_parallel_plans(config)[0])
    model.tie_weights()
    return model


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        model = load_split(path, world)
        partition = partition_of(attention_modules(model)[0])
        assert (partition.rank, partition.world) == (rank, world)
        heads = torch.arange(6).view(1, 6)
        assert torch.equal(partition.gather(partition.own(heads, 1), 1), heads)
        np.savez(f"{path}.{rank}.npz", **measure(model))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
