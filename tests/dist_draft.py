"What the children of test_eagle_draft.py run, started by launch."

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist


def train_fp32(nproc: int, config: dict) -> dict:
    """A draft's training without autocast and with features made in fp32; its weights are kept.

    A false green, two processes that do not talk, stops here.
    """
    from safetensors.torch import save_file

    from tpro_nb import eagle_draft

    real_model = eagle_draft.target_model
    real_matrices = eagle_draft.target_matrices
    real_draft = eagle_draft.new_draft
    made = []

    def no_autocast(*args, **kwargs):
        return nullcontext()

    def model_fp32(*args):
        return real_model(*args).float()

    def matrices_bf16(*args):
        return tuple(matrix.bfloat16() for matrix in real_matrices(*args))

    def watched_draft(*args):
        made.append(real_draft(*args))
        return made[-1]

    torch.autocast = no_autocast
    eagle_draft.target_model = model_fp32
    eagle_draft.target_matrices = matrices_bf16
    eagle_draft.new_draft = watched_draft
    out = eagle_draft.train_draft(**config)
    world = dist.get_world_size() if dist.is_initialized() else 1
    assert world == nproc, f"{nproc} processes were asked for, {world} talk to each other"
    if not out:
        return {}
    weights = {name: value.contiguous() for name, value in made[-1].state_dict().items()}
    save_file(weights, Path(config["work"]) / "weights.safetensors")
    return dict(
        world=world,
        backend=dist.get_backend() if world > 1 else None,
        steps=out["steps"],
        curve=out["curve"],
    )
