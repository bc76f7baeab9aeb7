"""The final policy as a folder that plain transformers or peft loads."""

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from prefopt_cli.models.adapters import save_adapter
from prefopt_cli.runs import atomic
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.trainer import PreferenceTrainer


def export_policy(
    trainer: PreferenceTrainer, tokenizer: PreTrainedTokenizerBase, run: RunFolder, card: str
) -> None:
    """Write `model/` in one go, from the main process.

    Raises:
        OSError: the disk is full; an earlier `model/` stays.
    """
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with atomic.folder(run.model) as folder:
        if isinstance(model, PeftModel):
            save_adapter(model, folder)
        else:
            model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        (folder / "README.md").write_text(card, encoding="utf-8")
