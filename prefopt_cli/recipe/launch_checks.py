"""Combinations in the ``launch`` and ``quantization`` sections that cannot work."""

from collections.abc import Iterator
from typing import Any, Literal

from prefopt_cli.recipe.launch_settings import LaunchSettings
from prefopt_cli.recipe.problems import Problem
from prefopt_cli.recipe.quantization_settings import QuantizationSettings
from prefopt_cli.recipe.section import Section
from prefopt_cli.recipe.values import Check, Settings

OF_ENGINES = {
    "zero_stage": ("deepspeed",),
    "reshard_after_forward": ("fsdp",),
    "cpu_offload": ("fsdp", "deepspeed"),
}
"""Keys of ``launch`` that only some engines have."""

OF_BITS = {
    "quant_type": 4,
    "double_quant": 4,
    "compute_dtype": 4,
    "storage_dtype": 4,
    "threshold": 8,
}
"""Keys of ``quantization`` that only one number of bits has."""


def _engine(settings: Settings) -> str:
    return str(settings.get("launch", "engine") or "ddp")


def _differs(value: Any, section: type[Section], key: str) -> bool:
    """Whether a value says anything: a resolved recipe, as run folders hold it, spells all defaults out."""
    return value is not None and value != section.model_fields[key].default


def _keys_of_the_engine(settings: Settings) -> Iterator[Problem]:
    if settings.mistaken("launch", "engine"):
        return
    for key, engines in OF_ENGINES.items():
        value = settings.get("launch", key)
        if _differs(value, LaunchSettings, key) and _engine(settings) not in engines:
            yield Problem(
                ("launch", key),
                f"is for engine: {' or '.join(engines)}, and the engine is {_engine(settings)}; leave it out",
            )


def _config_speaks_alone(settings: Settings) -> Iterator[Problem]:
    if settings.get("launch", "config") is None or settings.mistaken("launch", "config"):
        return
    for key in OF_ENGINES:
        if _differs(settings.get("launch", key), LaunchSettings, key):
            yield Problem(("launch", key), "the file of launch.config is used as it is; say it there")


def _machines_meet(settings: Settings) -> Iterator[Problem]:
    """Where they meet is asked only of those that start them: Slurm and SkyPilot know it, the recipe need not."""
    machines = settings.get("launch", "machines") or 1
    rank = settings.get("launch", "machine_rank") or 0
    if any(settings.mistaken("launch", key) for key in ("machines", "machine_rank", "rendezvous")):
        return
    in_config = settings.get("launch", "config") is not None  # where they may be, too
    if rank >= machines and not (in_config and machines == 1):
        yield Problem(
            ("launch", "machine_rank"),
            f"expected less than launch.machines ({machines}), as ranks begin at 0, found {rank}",
        )


def _bits_need_an_adapter(settings: Settings) -> Iterator[Problem]:
    quantised = isinstance(settings.get("quantization"), dict)
    if quantised and settings.get("adapter") in (None, "none") and not settings.mistaken("adapter"):
        yield Problem(
            ("quantization",),
            "quantised weights cannot be trained, only an adapter on them; add adapter: {type: lora, r: 16}",
        )


def cannot_be_sharded(
    quantization: QuantizationSettings, engine: str, zero_stage: int
) -> Literal["stage", "bits", "storage"] | None:
    """What keeps an engine from taking quantised weights apart; None where it can, or leaves them whole."""
    if engine == "deepspeed" and zero_stage == 3:
        return "stage"
    if engine != "fsdp":
        return None
    if quantization.bits == 8:
        return "bits"
    return "storage" if quantization.storage_dtype == "uint8" else None


def _bits_that_are_sharded(settings: Settings) -> Iterator[Problem]:
    """What the engines that take weights apart can do with quantised ones."""
    bits = settings.get("quantization", "bits")
    if bits is None or any(
        settings.mistaken(*key) for key in (("launch", "engine"), ("launch", "zero_stage"))
    ):
        return
    storage = settings.get("quantization", "storage_dtype") or "uint8"
    stored = QuantizationSettings.model_construct(bits=bits, storage_dtype=storage)
    fault = cannot_be_sharded(stored, _engine(settings), settings.get("launch", "zero_stage") or 2)
    if fault == "stage":
        yield Problem(
            ("launch", "zero_stage"),
            "3 takes weights apart, which quantised ones do not bear; write 2, or engine: fsdp",
        )
    elif fault == "bits":
        yield Problem(
            ("quantization", "bits"), "fsdp takes weights apart, which those of 8 bits do not bear; write 4"
        )
    elif fault == "storage" and not settings.mistaken("quantization", "storage_dtype"):
        dtype = settings.get("model", "dtype")
        wanted = dtype if dtype in ("float32", "bfloat16", "float16") else "bfloat16"
        yield Problem(
            ("quantization",),
            "fsdp takes weights of 4 bits apart only where they are kept in tensors of the model's type; add "
            f"storage_dtype: {wanted}",
        )


def _keys_of_the_bits(settings: Settings) -> Iterator[Problem]:
    bits = settings.get("quantization", "bits")
    for key, wanted in OF_BITS.items():
        value = settings.get("quantization", key)
        if bits is not None and bits != wanted and _differs(value, QuantizationSettings, key):
            yield Problem(("quantization", key), f"is for bits: {wanted}; leave it out")


LAUNCH_CHECKS: tuple[Check, ...] = (
    _keys_of_the_engine,
    _config_speaks_alone,
    _machines_meet,
    _bits_need_an_adapter,
    _bits_that_are_sharded,
    _keys_of_the_bits,
)
