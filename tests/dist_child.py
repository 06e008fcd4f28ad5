"What the children of test_distributed.py run; each says how many processes it saw."

import importlib
from types import SimpleNamespace

import torch
import torch.distributed as dist


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def train(nproc: int, jobs: list) -> dict:
    """Trainings by the chapters' own functions, with the world they ran in.

    A false green, two processes that do not talk, stops here.
    """
    runs = []
    for name, config in jobs:
        module = importlib.import_module(f"tpro_nb.{name}")
        training = getattr(module, f"train_{name}")
        runs.append(training(**config))
        assert world() == nproc, f"{nproc} processes were asked for, {world()} talk to each other"
    return dict(world=world(), backend=dist.get_backend() if nproc > 1 else None, runs=runs)


def sharded_blocks(model) -> int:
    "How many parts of a model FSDP2 shards by themselves."
    from torch.distributed.fsdp import FSDPModule

    return sum(isinstance(module, FSDPModule) for module in model.modules())


def sharded(nproc: int, jobs: list) -> dict:
    """`train` under `accelerate launch` with FSDP2.

    accelerate shards on accelerators only: it is told that the gloo processes are some; the rest
    is as on GPUs. Of each training is returned how its model lay over the processes.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer

    build = PartialState.__init__
    training_loop = Trainer._inner_training_loop
    training_step = Trainer.training_step
    seen: list[dict] = []
    whole_gradients: list[bool] = []

    def told_of_accelerators(self, *args, **kw):
        build(self, *args, **kw)
        self.distributed_type = DistributedType.MULTI_GPU

    def watched_loop(self, *args, **kw):
        result = training_loop(self, *args, **kw)
        weights = list(self.model.parameters())
        reference = getattr(self, "ref_model", None)
        seen.append(
            dict(
                kinds=sorted({type(weight).__name__ for weight in weights}),
                version=self.accelerator.state.fsdp_plugin.fsdp_version,
                unsharded_steps=sum(whole_gradients),
                blocks=sharded_blocks(self.model),
                reference_blocks=None if reference is None else sharded_blocks(reference),
                local=sum(weight.to_local().numel() for weight in weights),
                all=sum(weight.numel() for weight in weights),
            )
        )
        whole_gradients.clear()
        return result

    def watched_step(self, model, *args, **kw):
        result = training_step(self, model, *args, **kw)
        # FSDP2 has a gradient in `grad` only once it is summed and sharded
        whole_gradients.append(any(weight.grad is None for weight in model.parameters()))
        return result

    PartialState.__init__ = told_of_accelerators
    Trainer._inner_training_loop = watched_loop
    Trainer.training_step = watched_step
    return train(nproc, jobs) | dict(seen=seen)


def nano(seed: int = 0):
    "A Qwen3 of two layers in fp32, and 4 rows of 32 tokens."
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    rows = torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(1))
    return Qwen3ForCausalLM(config), rows


def start(nproc: int) -> tuple[int, int]:
    "gloo between the processes; this one's rank and the world's size, which they count themselves."
    if nproc == 1:
        return 0, 1
    dist.init_process_group("gloo")
    seen = torch.ones(1)
    dist.all_reduce(seen)
    assert world() == nproc == int(seen), f"{nproc} processes were asked for, {int(seen)} answered"
    return dist.get_rank(), dist.get_world_size()


def fsdp(nproc: int, out: str, steps: int = 4) -> dict:
    "The nano model for some steps of AdamW, sharded by fully_shard; its whole weights go to `out`."
    from safetensors.torch import save_file

    from tpro_nb.training import gather_model

    rank, processes = start(nproc)
    model, rows = nano()
    local = sum(weight.numel() for weight in model.parameters())
    if processes > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (processes,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        local = sum(weight.to_local().numel() for weight in model.parameters())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    mine = rows.chunk(processes)[rank]
    losses = []
    for _ in range(steps):
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        total = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(float(total) / processes)
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped),
        is_fsdp_enabled=processes > 1,
        is_world_process_zero=lambda: rank == 0,
    )
    whole = gather_model(trainer, lambda: nano()[0])  # as the trainings gather it; every rank calls
    assert (whole is None) == (rank > 0)
    if rank == 0:
        weights = {name: weight.detach() for name, weight in whole.named_parameters()}
        save_file({name: weight.contiguous() for name, weight in weights.items()}, out)
    return dict(world=processes, losses=losses, local=local)


def ulysses_over_gloo(model, processes: int, rows: int) -> None:
    "DeepSpeed's Ulysses attention in a model, its communication over gloo."
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    ds_comm = importlib.import_module("deepspeed.comm.comm")
    ds_torch = importlib.import_module("deepspeed.comm.torch")
    # else it compiles C++ for a minute, as deepspeed.comm.init_distributed does
    ds_torch.build_shm_op = lambda: None
    ds_comm.cdb = ds_torch.TorchBackend("gloo", None, None)
    mesh = UlyssesSPAttentionHF.register_with_transformers(
        model,
        "sdpa",
        sequence_parallel_size=processes,
        micro_batch_size=rows,
        seq_length_is_variable=True,
    )
    assert mesh.get_sequence_parallel_world_size() == processes


def ulysses(nproc: int, out: str) -> dict:
    "Loss and gradients of the nano model on causal sequences of 32 tokens, cut over the processes."
    from safetensors.torch import save_file

    rank, processes = start(nproc)
    model, rows = nano()
    model.train()
    if processes > 1:
        ulysses_over_gloo(model, processes, len(rows))

    def mine(whole: torch.Tensor) -> torch.Tensor:
        "This rank's part of every row."
        return whole.chunk(processes, dim=1)[rank].contiguous()

    positions = torch.arange(32).expand(len(rows), -1)
    labels = torch.nn.functional.pad(rows[:, 1:], (0, 1), value=-100)
    logits = model(input_ids=mine(rows), position_ids=mine(positions), use_cache=False).logits
    summed = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), mine(labels).flatten(), ignore_index=-100, reduction="sum"
    )
    loss = summed / int((labels != -100).sum())
    loss.backward()
    total = loss.detach().clone()
    if processes > 1:
        dist.all_reduce(total)
        for weight in model.parameters():
            dist.all_reduce(weight.grad)
    if rank == 0:
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, out)
    return dict(world=processes, loss=float(total))
