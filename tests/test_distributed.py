"""Models whose weights are spread over several processes: one clear error, or the same tokens on every rank."""

import functools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from hawk_kernels import prune
from tests.method_checks import options_of
from tests.tiny_models import Picture, question, qwen_batch, qwen_vl

RANKS = 2
READ_A_LAYER = ("hawk", "hawk_rope", "heed", "key_norm", "dart", "fastv")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def tensor_parallel(model, folder):
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    mesh = init_device_mesh("cpu", (RANKS,))
    parallel = type(model).from_pretrained(folder, tp_plan="auto", device_mesh=mesh)
    return parallel, parallel


def fsdp2(model, folder):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    return model, fully_shard(model, mesh=mesh)


def fsdp1(model, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    kind = type(model.model.language_model.layers[0])
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={kind})
    whole = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    return model, whole


def data_parallel(model, folder):
    return model, torch.nn.parallel.DistributedDataParallel(model)


SPREAD = {"tensor parallelism": tensor_parallel, "FSDP": fsdp1, "fully_shard": fsdp2, "DDP": data_parallel}


def kept_by(method, model, called):
    with torch.no_grad(), prune(model, 0.3, method=method, **options_of(method)) as pruning:
        called(**qwen_batch(question(Picture(4, 4))))
    return pruning.keep_mask


def work(rank, way, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    try:
        model = qwen_vl(layers=3)
        expected = {method: kept_by(method, model, model) for method in (*READ_A_LAYER, "divprune")}
        model, called = SPREAD[way](model, folder)
        for method, kept in expected.items():
            if way == "DDP" or method == "divprune":
                assert torch.equal(kept_by(method, model, called), kept), method
                continue
            with pytest.raises(ValueError, match="cannot rank visual tokens by the sharded weights"):
                kept_by(method, model, called)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("way", SPREAD)
def test_every_rank_keeps_the_same_tokens_or_says_that_it_cannot(way, tmp_path):
    mp.spawn(work, (way, free_port(), str(tmp_path)), nprocs=RANKS)
