"""The final policy as a folder that plain transformers or peft loads."""

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from prefopt_cli.models.adapters import save_adapter
from prefopt_cli.models.policy import recorded_quantization, write_quantization
from prefopt_cli.runs import atomic
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.engines import whole_weights
from prefopt_cli.training.trainer import PreferenceTrainer


def export_policy(
    trainer: PreferenceTrainer, tokenizer: PreTrainedTokenizerBase, run: RunFolder, card: str
) -> None:
    """Write `model/` in one go, from the main process; every process must call it, as each may hold a part.

    Raises:
        OSError: the disk is full; an earlier `model/` stays.
    """
    weights = whole_weights(trainer)
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with atomic.folder(run.model) as folder:
        if isinstance(model, PeftModel):
            save_adapter(model, folder, weights)
            if (quantization := recorded_quantization(run.read_manifest()["lineage"])) is not None:
                write_quantization(folder, quantization)
        else:
            model.save_pretrained(str(folder), state_dict=weights)
        tokenizer.save_pretrained(str(folder))
        (folder / "README.md").write_text(card, encoding="utf-8")
