"What the children of test_eagle_draft.py run, started by core.launch."
from contextlib import nullcontext
from pathlib import Path
import torch
import torch.distributed as dist

def train_fp32(nproc: int, config: dict) -> dict:
    "A draft's training without autocast and with features made in fp32, and the weights it ends with. A false green, two processes that do not talk, stops here."
    from safetensors.torch import save_file
    from tpro_nb import eagle_draft as ed
    torch.autocast, kept, model_of, matrices, new = lambda *a, **k: nullcontext(), {}, ed.target_model, ed.target_matrices, ed.new_draft
    ed.target_model = lambda *a: model_of(*a).float()
    ed.target_matrices = lambda *a: tuple(m.bfloat16() for m in matrices(*a))
    def watched(*a): kept["draft"] = new(*a); return kept["draft"]
    ed.new_draft = watched
    out = ed.train(**config)
    world = dist.get_world_size() if dist.is_initialized() else 1
    assert world == nproc, f"{nproc} processes were asked for, {world} talk to each other"
    if not out: return {}
    save_file({k: v.contiguous() for k, v in kept["draft"].state_dict().items()}, Path(config["work"])/"weights.safetensors")
    return dict(world=world, backend=dist.get_backend() if world > 1 else None, steps=out["steps"], curve=out["curve"])
