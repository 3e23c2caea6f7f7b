"""Models whose weights are spread over several processes: every rank keeps the tokens that one process would keep."""

import datetime
import functools
import json
import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from hawk_kernels import prune
from tests.method_checks import options_of
from tests.tiny_families import batch, tiny_model
from tests.tiny_models import BEGIN, Picture, question, qwen_batch, qwen_vl, words

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


IMAGE_PROMPT, TEXT_PROMPT = question(Picture(4, 4)), [BEGIN, *words(20)]


def kept_by(method, model, called, *prompts):
    with torch.no_grad(), prune(model, 0.3, method=method, **options_of(method)) as pruning:
        for prompt in prompts or [IMAGE_PROMPT]:
            called(**qwen_batch(prompt))
    return pruning.keep_mask


def check(way, folder):
    model = qwen_vl(layers=3)
    expected = {method: kept_by(method, model, model) for method in (*READ_A_LAYER, "divprune")}
    model, called = SPREAD[way](model, folder)
    for method, kept in expected.items():
        if way == "FSDP" and method == "fastv":
            # FSDP1 would gather a later layer on those ranks alone that choose tokens
            with pytest.raises(ValueError, match="cannot rank visual tokens by the sharded weights of this layer"):
                kept_by(method, model, called)
            continue
        assert torch.equal(kept_by(method, model, called), kept), method
    if way == "fully_shard":
        hybrid, _ = fsdp2(tiny_model("lfm2_vl"), folder)
        with (
            prune(hybrid, 0.3, head_weights="uniform"),
            pytest.raises(ValueError, match="sharded weights in a lfm2_vl"),
        ):
            hybrid(**batch("lfm2_vl", IMAGE_PROMPT))
    if way != "tensor parallelism":
        # ranks read prompts of their own: one may have no image where another has some
        prompts = [TEXT_PROMPT, IMAGE_PROMPT, TEXT_PROMPT, IMAGE_PROMPT]
        own = prompts[1:] if dist.get_rank() else prompts[:3]
        last = IMAGE_PROMPT if dist.get_rank() else TEXT_PROMPT
        for method in ("hawk", "fastv") if way != "FSDP" else ("hawk",):
            kept = kept_by(method, model, called, *own)
            assert kept.all() if last is TEXT_PROMPT else torch.equal(kept, expected[method]), method


def work(rank, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=120),
    )
    failures = {}
    try:
        for way in SPREAD:
            try:
                check(way, f"{folder}/model")
            except BaseException:
                failures[way] = traceback.format_exc()
    finally:
        with open(f"{folder}/{rank}.json", "w") as file:
            json.dump(failures, file)
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What failed on each rank, by way; one pair of processes runs them all, since starting them is what takes time."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (free_port(), str(folder)), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("way", SPREAD)
def test_every_rank_keeps_the_tokens_that_one_process_would_keep(way, failures):
    for rank, failed in enumerate(failures):
        assert way not in failed, f"rank {rank}: {failed[way]}"
