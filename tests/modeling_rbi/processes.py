# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What tests run in several processes at once. A server imports torch and transformers once, and forks them."""

import multiprocessing
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from modeling_rbi import RBIForImageClassification


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch.distributed", "transformers.modeling_utils", "transformers.models.convnext.modeling_convnext"]
)


def run_processes(target, world_size: int, folder: Path, *arguments):
    """Runs `target(rank, world_size, folder, *arguments)` in a process group of gloo, and waits for all processes."""
    processes = [
        _CONTEXT.Process(target=_run, args=(target, rank, world_size, folder, *arguments))
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=300)
        assert [process.exitcode for process in processes] == [0] * world_size
    finally:
        for process in processes:
            process.kill()


def _run(target, rank: int, world_size: int, folder: Path, *arguments):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    target(rank, world_size, folder, *arguments)
    # All is written. gloo's threads can outlive the group and abort an orderly exit of the interpreter.
    torch.distributed.barrier()
    os._exit(0)


def gather(rank: int, world_size: int, folder: Path, mask_kind: str):
    """Forward and backward of a part of the batch, with the images of all processes as neighbors."""
    model = RBIForImageClassification.from_pretrained(folder / "model").train()
    model.rbi.gather_across_processes = True
    batch = load_file(folder / "batch.safetensors")
    rows = torch.arange(7).tensor_split(world_size)[rank]
    mask = {"none": None, "images": batch["mask"][rows], "pairs": batch["pairs"][rows][:, rows]}[mask_kind]
    outputs = model(batch["pixel_values"][rows], relation_mask=mask, output_relations=True)
    loss = torch.nn.functional.cross_entropy(outputs.logits, batch["labels"][rows], reduction="sum") / 7
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    for gradient in gradients.values():
        torch.distributed.all_reduce(gradient)
    results = {"logits": outputs.logits.detach(), "attentions": outputs.relation_attentions.detach()}
    results["similarities"] = outputs.relation_similarities.contiguous()
    save_file(results, folder / f"results.{rank}")
    save_file(gradients, folder / f"gradients.{rank}")


def train_distributed(rank: int, world_size: int, folder: Path):
    """Two steps of DDP, each process on a batch of its own. Keeps the first step's gradients and the last weights."""
    model = RBIForImageClassification.from_pretrained(folder / "model").train()
    model = DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = load_file(folder / "batch.safetensors")
    # In the second step DDP complains of parameters that the first one left without a gradient.
    for step in range(2):
        optimizer.zero_grad()
        model(pixel_values=batch["pixel_values"][rank], labels=batch["labels"][rank]).loss.backward()
        if step == 0:
            gradients = {name: value.grad.clone() for name, value in model.module.named_parameters()}
        optimizer.step()
    save_file(gradients, folder / f"gradients.{rank}")
    save_file({name: value.detach() for name, value in model.module.named_parameters()}, folder / f"weights.{rank}")
