# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Parameter groups, frozen layers, LoRA, and the moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from modeling_rbi import MissingPackageError, RBIForImageClassification, UserError


# Optimizers that `--optim` of TrainingArguments does not offer. The authors use RAdam.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "radam": (torch.optim.RAdam, {"decoupled_weight_decay": True}),
    "sgd_nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}


def rbi_model(model: nn.Module) -> RBIForImageClassification:
    """The RBI model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def layer_numbers(backbone: nn.Module) -> dict[str, int]:
    r"""
    Depth of each parameter of a backbone: 0 before the first block, then the number of the block, counted from 1, and
    one more after the last block. Most backbones consist of a list of modules of one class. These are the blocks; if
    they are stages, the members of the stages' lists are the blocks.
    """
    blocks = list(_find_blocks(backbone, levels=2))
    names = [name for name, _ in backbone.named_parameters()]
    block_of = {
        name: next((number for number, block in enumerate(blocks, start=1) if name.startswith(f"{block}.")), 0)
        for name in names
    }
    last = max((place for place, name in enumerate(names) if block_of[name]), default=len(names))
    numbers, depth = {}, 0
    for place, name in enumerate(names):
        # Layers between two blocks, such as the downsampling of a stage, have the number of the block before.
        depth = max(depth, block_of[name]) if place <= last else len(blocks) + 1
        numbers[name] = block_of[name] or depth
    return numbers


def _find_blocks(module: nn.Module, path: str = "", *, levels: int) -> Iterator[str]:
    """Paths of the blocks, in order."""
    if hasattr(module, "base_layer"):
        return  # a layer with peft's adapters, which are in lists
    start = f"{path}." if path else ""
    members = [(f"{start}{name}", child) for name, child in module.named_children()]
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
    if is_list and members and len({type(member) for _, member in members}) == 1 and _count(members[0][1]):
        for member_path, member in members:
            inner = list(_find_blocks(member, member_path, levels=levels - 1)) if levels > 1 else []
            inner_size = sum(_count(member.get_submodule(block.removeprefix(f"{member_path}."))) for block in inner)
            # A list that is only a small part of a block does not make the block a stage.
            yield from inner if inner_size > _count(member) / 2 else [member_path]
    else:
        for member_path, member in members:
            yield from _find_blocks(member, member_path, levels=levels)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    head_learning_rate: float | None = None,
    layer_decay: float | None = None,
) -> list[dict]:
    r"""
    Groups the trainable parameters of an RBI model for an optimizer.

    Args:
        model (`nn.Module`):
            An RBI model, or a `PeftModel` of one.
        learning_rate (`float`):
            Learning rate of the backbone's last layer.
        weight_decay (`float`):
            Weight decay of matrices. Biases, norms and scalars have none.
        head_learning_rate (`float`, *optional*):
            Learning rate of RRA and the classifier; by default `learning_rate`.
        layer_decay (`float`, *optional*):
            Ratio, in (0, 1), of the learning rate of each block of the backbone to that of the next block.

    Returns:
        `list[dict]`: groups with `params`, `lr` and `weight_decay`.
    """
    rbi = rbi_model(model)
    numbers = {id(parameter): 0 for parameter in rbi.base_model.backbone.parameters()}
    if layer_decay is not None:
        by_name = layer_numbers(rbi.base_model.backbone)
        deepest = max(by_name.values())
        for name, parameter in rbi.base_model.backbone.named_parameters():
            numbers[id(parameter)] = by_name[name] - deepest
    groups: dict[tuple[float, float], dict] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in numbers:
            rate = learning_rate * (layer_decay or 1.0) ** -numbers[id(parameter)]
        else:
            rate = learning_rate if head_learning_rate is None else head_learning_rate
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def freeze_backbone(model: RBIForImageClassification):
    """Trains only the head and the classifier. The backbone stays in evaluation mode, without dropout."""
    backbone = model.base_model.backbone
    backbone.requires_grad_(False)
    backbone.register_forward_pre_hook(lambda module, _: module.eval() and None)


def freeze_batch_norm(model: RBIForImageClassification):
    """Keeps the running statistics of batch normalization, and uses them in training, too."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda module, _: module.eval() and None)


def set_batch_norm_momentum(model: RBIForImageClassification, momentum: float):
    """Sets the weight of the newest batch in the running statistics of batch normalization."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum


def add_lora(
    model: RBIForImageClassification, rank: int, alpha: float | None = None, dropout: float = 0.0
) -> nn.Module:
    r"""
    Adds low-rank adapters (LoRA, Hu et al. 2022, with peft) to all linear and ungrouped convolution layers of the
    backbone. RRA and the classifier are trained in full.

    Args:
        model (`RBIForImageClassification`):
            The model, which is changed in place.
        rank (`int`):
            Rank of the adapters.
        alpha (`float`, *optional*):
            Scale of the adapters; by default twice the rank.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout before the adapters.

    Returns:
        `PeftModel`: the model with its adapters.

    Raises:
        MissingPackageError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPackageError("LoRA needs peft: `pip install peft`.") from error
    targets = [
        name
        for name, module in model.named_modules()
        if ".backbone." in f".{name}"
        and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=["rra", "classifier"],
    )
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(convolution := getattr(module, "base_layer", None), nn.Conv2d):
            for name in ("kernel_size", "stride", "dilation"):  # MobileNet computes its padding from these
                setattr(module, name, getattr(convolution, name))
    return adapted


def merge_lora(model: nn.Module):
    """Adds the adapters to the weights in place, so that the RBI model inside a `PeftModel` is a plain one again."""
    model.merge_and_unload()  # type: ignore[operator]


class MovingAverage:
    r"""
    Exponential moving average of a model's trainable weights. Buffers are not averaged. The decay after n steps is
    min(decay, (1 + n) / (10 + n)), so that the initial weights have little influence in short runs.

    Args:
        model (`nn.Module`):
            The model, not wrapped.
        decay (`float`):
            Decay per step, in (0, 1).

    Raises:
        UserError: if the decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise UserError(f"The decay of the moving average must be between 0 and 1, got {decay}.")
        self.decay = decay
        self.num_updates = 0
        self.average = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def update(self, model: nn.Module):
        """Updates the average with the weights after an optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.average, self._weights(model), 1 - decay)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Gives the model the average as its weights, and its own weights back afterwards."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    @torch.no_grad()
    def swap(self, model: nn.Module):
        """Swaps the model's weights and the average."""
        for average, weight in zip(self.average, self._weights(model), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state for a checkpoint."""
        state = {f"average.{number}": value for number, value in enumerate(self.average)}
        return state | {"num_updates": torch.tensor(self.num_updates)}

    def load_state_dict(self, state: dict[str, torch.Tensor]):
        """Restores the state of a checkpoint."""
        self.num_updates = int(state["num_updates"])
        for number, value in enumerate(self.average):
            value.copy_(state[f"average.{number}"])

    @staticmethod
    def _weights(model: nn.Module) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
