"""How the processes of a run share its work: DDP, FSDP2 or DeepSpeed, as the launcher's environment says.

The variables are accelerate's own, so that `accelerate launch`, torchrun and prefopt's launcher all lead here. One
internal of accelerate is touched, in `engines_on_any_device`; tests/slow/test_engines.py, on the CPU, guards it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, fsdp2_prepare_model, is_deepspeed_available
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from prefopt_cli.errors import UserError
from prefopt_cli.launch.engine_variables import engine_asked, facts_in_a_process
from prefopt_cli.launch.resolving import ONE_PROCESS, launch_here
from prefopt_cli.models.adapters import is_stacked
from prefopt_cli.recipe.launch_settings import Engine, LaunchSettings


def engine() -> Engine:
    """What the launcher's environment asks for."""
    return engine_asked(os.environ)


def sharding_asked(launch: LaunchSettings) -> tuple[str, int]:
    """(engine, ZeRO stage): what a launcher's environment asks for, else what the recipe will have it ask for.

    Raises:
        UserError: DeepSpeed's file, which the environment names, cannot be used.
    """
    asked = engine()
    if asked != "ddp":
        facts = facts_in_a_process(os.environ)
        return asked, launch.zero_stage if facts is None else facts.zero_stage
    with suppress(
        UserError
    ):  # who trains or checks has read its file before; who reads a run's data may lack it
        launch = launch_here(launch).settings if launch.config is not None else launch
    return launch.engine, launch.zero_stage


def require_engine() -> None:
    """Refuse engines that cannot work here, before anything is read.

    Raises:
        UserError: FSDP's first version, one process, or DeepSpeed where it is not installed.
    """
    asked = engine()
    if asked == "ddp":
        return
    if asked == "fsdp" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "The launcher asks for FSDP 1, which PyTorch has given up. Set fsdp_version: 2 in accelerate's "
            "configuration, or launch.engine: fsdp in the recipe."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 and asked == "fsdp":
        raise UserError(ONE_PROCESS)
    if asked == "deepspeed" and not is_deepspeed_available():
        raise UserError(
            "launch.engine: deepspeed needs a package that is not installed: `pip install deepspeed`."
        )


@contextmanager
def engines_on_any_device() -> Iterator[None]:
    """Within the block, an accelerator that is made takes FSDP and DeepSpeed on the CPU too.

    accelerate itself knows only DDP there, and lets the engine asked for go without a word.
    """
    plain = AcceleratorState.__init__

    def with_engine(self: Any, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        asked = engine()
        if asked == "fsdp":
            _keep_precision(options.get("fsdp_plugin"))
        if self.distributed_type != DistributedType.MULTI_CPU or asked == "ddp":
            return
        if asked == "fsdp":
            self.fsdp_plugin = options["fsdp_plugin"]
            if self._mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self._mixed_precision)
                _keep_precision(self.fsdp_plugin)
        else:
            plugin = options["deepspeed_plugin"]
            plugin.set_mixed_precision(self._mixed_precision)
            plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = plugin
            self._mixed_precision = "no"  # DeepSpeed has its own
        self.distributed_type = DistributedType(asked.upper())
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = with_engine
    try:
        yield
    finally:
        AcceleratorState.__init__ = plain


def _keep_precision(plugin: Any) -> None:
    """Half precision for computing only: accelerate would round log-probabilities and sums of gradients, too."""
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy) and policy.param_dtype is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, output_dtype=None
        )


def shard(model: nn.Module, args: TrainingArguments) -> nn.Module:
    """A policy all of whose weights are trained or asked, brought to its device: under FSDP every process has a part.

    The trainer would do it later, after the frozen policies have been scored; a device that the whole model does not
    fit would never come so far, and the policy and its reference would be computed in different numbers.
    """
    if engine() != "fsdp" or not torch.distributed.is_initialized():
        return model.to(args.device)
    with engines_on_any_device():
        accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.device.type == "cpu")
    sharded: nn.Module = fsdp2_prepare_model(accelerator, model)
    return sharded


@contextmanager
def whole_models(args: TrainingArguments) -> Iterator[None]:
    """Within the block, models are loaded as they are; ZeRO-3 would take them apart before it can run them."""
    plugin = args.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def agreed(stopping: Callable[[], bool], device: torch.device) -> Callable[[], bool]:
    """Whether any process has been asked to stop; all must ask at the same times."""

    def any_stops() -> bool:
        flag = torch.tensor(int(stopping()), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    return any_stops


def reshard(model: nn.Module) -> None:
    """Give back what forward passes have gathered and kept: an optimizer made now would get the whole weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the model's weights only."""
    zero = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return zero or any(isinstance(module, FSDPModule) for module in model.modules())


def whole_weights(trainer: Any) -> dict[str, Tensor] | None:
    """The trained policy's weights, of a model with adapters those that are trained, on the CPU of the main process.

    Every process must call it. None where the main process has them anyway, in `trainer.model`.
    """
    if trainer.is_fsdp_enabled:
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=isinstance(trainer.model, PeftModel)
        )
        whole: Any = get_model_state_dict(trainer.model, options=options)
        return dict(whole)
    return _whole_of_deepspeed(trainer) if trainer.is_deepspeed_enabled else None


def _whole_of_deepspeed(trainer: Any) -> dict[str, Tensor]:
    """Those in float32 that DeepSpeed trains, where the model itself has them in half precision."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    model = trainer.accelerator.unwrap_model(trainer.model)
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(model, PeftModel) and not parameter.requires_grad:
            continue
        whole = safe_get_full_fp32_param(parameter)
        if whole is None:
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
        if trainer.is_world_process_zero():
            state[name] = whole.cpu()
    return state | {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}


def require_exportable(model: nn.Module) -> None:
    """Refuse policies that an engine which shards could train but not put together again.

    Raises:
        UserError: a new adapter on top of an earlier one.
    """
    if engine() != "ddp" and is_stacked(model):
        raise UserError(
            f"method.adapter_per_stage: new does not work with launch.engine: {engine()}, which shards the two "
            "adapters whose sum is saved. Use engine: ddp, or adapter_per_stage: continue."
        )


class AbsentReference(nn.Module):
    """Stands where TRL wants a reference model that nothing will ask."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.nothing = nn.Parameter(torch.zeros(1), requires_grad=False)  # ZeRO-3 takes no model without any

    def forward(self) -> None:
        """Is not called."""
        raise NotImplementedError
