"What the children of test_distributed.py run, started by core.launch; each says how many processes it saw."
import torch
import torch.distributed as dist
from pathlib import Path
from types import SimpleNamespace

def world() -> int: return dist.get_world_size() if dist.is_initialized() else 1

def train(nproc: int, jobs: list) -> dict:
    "Trainings by the chapters' own functions, with the world they ran in. A false green, two processes that do not talk, stops here."
    from importlib import import_module
    out = []
    for module, config in jobs:
        out.append(import_module(f"tpro_nb.{module}").train(**config))
        assert world() == nproc, f"{nproc} processes were asked for, {world()} talk to each other"
    return dict(world=world(), backend=dist.get_backend() if nproc > 1 else None, runs=out)

def sharded(nproc: int, jobs: list) -> dict:
    "`train` under `accelerate launch` with FSDP2. accelerate shards on accelerators only: it is told that the gloo processes are some; the rest is as on GPUs."
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import FSDPModule
    from transformers import Trainer
    build, loop, step, seen, whole = PartialState.__init__, Trainer._inner_training_loop, Trainer.training_step, [], []
    def told(self, *args, **kw): build(self, *args, **kw); self.distributed_type = DistributedType.MULTI_GPU
    def watched(self, *args, **kw):
        got, parts = loop(self, *args, **kw), list(self.model.parameters())
        blocks = lambda m: sum(isinstance(x, FSDPModule) for x in m.modules())
        seen.append(dict(kinds=sorted({type(p).__name__ for p in parts}), version=self.accelerator.state.fsdp_plugin.fsdp_version, unsharded_steps=sum(whole), blocks=blocks(self.model),
                         reference_blocks=blocks(self.ref_model) if getattr(self, "ref_model", None) is not None else None, local=sum(p.to_local().numel() for p in parts), all=sum(p.numel() for p in parts)))
        whole.clear()
        return got
    def stepped(self, model, *args, **kw):
        got = step(self, model, *args, **kw)
        whole.append(any(p.grad is None for p in model.parameters()))      # FSDP2 has a gradient in p.grad only once it is summed and sharded
        return got
    PartialState.__init__, Trainer._inner_training_loop, Trainer.training_step = told, watched, stepped
    return train(nproc, jobs) | dict(seen=seen)

def nano(seed: int = 0):
    "A Qwen3 of two layers in fp32, and 4 rows of 32 tokens."
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(seed)
    m = Qwen3ForCausalLM(Qwen3Config(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                     head_dim=8, max_position_embeddings=64, tie_word_embeddings=True, attn_implementation="sdpa"))
    return m, torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(1))

def start(nproc: int) -> tuple[int, int]:
    "gloo between `nproc` processes; this one's rank and the world's size, counted by the processes themselves."
    if nproc == 1: return 0, 1
    dist.init_process_group("gloo")
    seen = torch.ones(1); dist.all_reduce(seen)
    assert world() == nproc == int(seen), f"{nproc} processes were asked for, {int(seen)} answered"
    return dist.get_rank(), dist.get_world_size()

def fsdp(nproc: int, out: str, steps: int = 4) -> dict:
    "The nano model for a few steps of AdamW, sharded over `nproc` processes by fully_shard; its whole weights go to `out`."
    from safetensors.torch import save_file
    from tpro_nb.base_model import whole
    rank, n = start(nproc)
    model, rows = nano()
    local = sum(p.numel() for p in model.parameters())
    if n > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (n,))
        for layer in model.model.layers: fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        local = sum(p.to_local().numel() for p in model.parameters())
    opt, losses, mine = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6), [], rows.chunk(n)[rank]
    for _ in range(steps):
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward(); opt.step(); opt.zero_grad()
        both = loss.detach().clone()
        if n > 1: dist.all_reduce(both)
        losses.append(float(both)/n)
    trainer = SimpleNamespace(model=model, accelerator=SimpleNamespace(unwrap_model=lambda m: m), is_fsdp_enabled=n > 1, is_world_process_zero=lambda: rank == 0)
    got = whole(trainer, lambda: nano()[0])                # as the trainings gather it; every rank calls
    assert (got is None) == (rank > 0)
    if rank == 0: save_file({k: p.detach().contiguous() for k, p in got.named_parameters()}, out)
    return dict(world=n, losses=losses, local=local)

def ulysses(nproc: int, out: str) -> dict:
    "Loss and gradients of the nano model on one causal sequence of 32 tokens, cut over `nproc` processes by DeepSpeed's Ulysses attention."
    from safetensors.torch import save_file
    rank, n = start(nproc)
    model, rows = nano()
    model.train()
    if n > 1:
        import importlib
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        ds_comm, ds_torch = (importlib.import_module(f"deepspeed.comm.{m}") for m in ("comm", "torch"))
        ds_torch.build_shm_op = lambda: None                       # else it compiles C++ for a minute, as deepspeed.comm.init_distributed does
        ds_comm.cdb = ds_torch.TorchBackend("gloo", None, None)
        mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", sequence_parallel_size=n, micro_batch_size=len(rows), seq_length_is_variable=True)
        assert mpu.get_sequence_parallel_world_size() == n
    cut = lambda x: x.chunk(n, dim=1)[rank].contiguous()           # a rank sees its half of every row, and the positions of that half
    where, nxt = torch.arange(32).expand(len(rows), -1), torch.nn.functional.pad(rows[:, 1:], (0, 1), value=-100)
    logits = model(input_ids=cut(rows), position_ids=cut(where), use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), cut(nxt).flatten(), ignore_index=-100, reduction="sum")/int((nxt != -100).sum())
    loss.backward()
    total = loss.detach().clone()
    for x in [total, *(p.grad for p in model.parameters())] if n > 1 else []: dist.all_reduce(x)
    if rank == 0: save_file({k: p.grad.contiguous() for k, p in model.named_parameters()}, out)
    return dict(world=n, loss=float(total))
