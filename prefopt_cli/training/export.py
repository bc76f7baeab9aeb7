"""The final policy as a folder that plain transformers or peft loads."""

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from prefopt_cli.runs import atomic
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.trainer import TRAINED_ADAPTER, PreferenceTrainer


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
            _name_base_absolutely(model)
            model.save_pretrained(str(folder), selected_adapters=[TRAINED_ADAPTER])
        else:
            model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        (folder / "README.md").write_text(card, encoding="utf-8")


def _name_base_absolutely(model: PeftModel) -> None:
    """A base given by a relative path would be found from one working directory only."""
    config = model.peft_config[TRAINED_ADAPTER]
    if Path(config.base_model_name_or_path or "").is_dir():
        config.base_model_name_or_path = str(Path(config.base_model_name_or_path).resolve())
