"""Models, tokenizers and adapters as a recipe wants them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from prefopt_cli.errors import UserError
from prefopt_cli.models import loading
from prefopt_cli.models.policy import PolicySource
from prefopt_cli.recipe.schema import LoraAdapter, ModelSettings

LORA = LoraAdapter(type="lora", r=4, lora_alpha=8)


@pytest.fixture(scope="module")
def base(tiny_world: Path) -> PolicySource:
    return PolicySource(str(tiny_world / "model"))


@pytest.fixture(scope="module")
def trained(base: PolicySource, tmp_path_factory: pytest.TempPathFactory) -> PolicySource:
    """The base with an adapter that does something."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(loading.load_model(base, _settings(base), LORA), loading.new_adapter(base, LORA))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return PolicySource(base.weights, folder)


def _settings(source: PolicySource, **others: object) -> ModelSettings:
    return ModelSettings(name_or_path=source.weights, **others)


def _counts(model: torch.nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@pytest.mark.parametrize("adapter", ["none", LORA], ids=["full", "adapter"])
@pytest.mark.parametrize("continued", [False, True], ids=["from the base", "from an adapter"])
def test_the_model_without_weights_is_the_one_with_them(
    base: PolicySource, trained: PolicySource, adapter: LoraAdapter | str, continued: bool
) -> None:
    source = trained if continued else base
    model = loading.load_model(source, _settings(source), adapter)
    config = loading.new_adapter(source, adapter)
    assert (config is None) == (adapter == "none" or continued)
    model = get_peft_model(model, config) if config else model
    skeleton = loading.on_meta_device(source, _settings(source), adapter)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert _counts(skeleton) == _counts(model)
    assert [p.dtype for p in skeleton.parameters()] == [p.dtype for p in model.parameters()]


def test_an_adapter_stays_or_is_merged(base: PolicySource, trained: PolicySource) -> None:
    ids = torch.arange(5, 20)[None]
    kept = loading.load_model(trained, _settings(trained), LORA).eval()
    merged = loading.load_model(trained, _settings(trained), "none").eval()
    plain = loading.load_model(base, _settings(base), "none").eval()
    assert isinstance(kept, PeftModel)
    assert not isinstance(merged, PeftModel)
    with torch.no_grad():
        torch.testing.assert_close(kept(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
        assert (merged(ids).logits - plain(ids).logits).abs().max() > 0.01
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert {name for name, p in kept.named_parameters() if p.requires_grad} == {
        name for name, _ in kept.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("adapter", ["none", LORA], ids=["full", "adapter"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_types_of_weights(dtype: str, adapter: LoraAdapter | str, base: PolicySource, tmp_path: Path) -> None:
    """`auto`: trained weights hold small updates in float32; frozen ones stay as the checkpoint has them."""
    folder = shutil.copytree(base.weights, tmp_path / "brain")
    loading.load_model(base, _settings(base, dtype="bfloat16"), "none").save_pretrained(folder)
    source = PolicySource(str(folder))
    expected = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
        dtype, torch.float32 if adapter == "none" else torch.bfloat16
    )
    settings = _settings(source, dtype=dtype)
    assert {p.dtype for p in loading.load_model(source, settings, adapter).parameters()} == {expected}
    skeleton = loading.on_meta_device(source, settings, adapter)
    assert {p.dtype for name, p in skeleton.named_parameters() if "lora_" not in name} == {expected}


def test_the_recipes_chat_template(base: PolicySource, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    tokenizer = loading.load_tokenizer(base, _settings(base, chat_template=str(template)))
    turns = [{"role": "user", "content": "é"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "[é]"
    own = loading.load_tokenizer(base, _settings(base))
    assert own.apply_chat_template(turns, tokenize=False) == "<s><|user|>é</s>"
    template.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"mine\.jinja cannot be read"):
        loading.load_tokenizer(base, _settings(base, chat_template=str(template)))


def test_the_tokenizer_beside_the_adapter_wins(
    base: PolicySource, trained: PolicySource, tmp_path: Path
) -> None:
    adapter = shutil.copytree(trained.adapter, tmp_path / "adapter")
    tokenizer = loading.load_tokenizer(base, _settings(base))
    tokenizer.chat_template = "mine"
    tokenizer.save_pretrained(adapter)
    assert (
        loading.load_tokenizer(PolicySource(base.weights, adapter), _settings(base)).chat_template == "mine"
    )
    assert loading.load_tokenizer(trained, _settings(base)).chat_template != "mine"


def test_a_named_model_is_told_with_its_place(tmp_path: Path) -> None:
    source = PolicySource(str(tmp_path), name="toy:x")
    with pytest.raises(UserError, match=f"model toy:x \\({tmp_path}\\) cannot be loaded"):
        loading.load_config(source, _settings(source))


CODE = """
from pathlib import Path
Path({witness!r}).write_text("ran")
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class OwnConfig(PretrainedConfig):
    model_type = "own"
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def _with_code(base: PolicySource, folder: Path, file: str, **auto_map: object) -> Path:
    """A copy of the model whose `file` asks for own code; running that code writes the returned file."""
    shutil.copytree(base.weights, folder)
    witness = folder.parent / "witness"
    (folder / "own.py").write_text(CODE.format(witness=str(witness)))
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **auto_map}))
    return witness


def test_code_of_a_model_is_not_run(base: PolicySource, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    witness = _with_code(
        base, folder, "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"}
    )
    source = PolicySource(str(folder))
    with pytest.raises(UserError, match=r"its own code.*trust_remote_code: true"):
        loading.load_config(source, _settings(source))
    assert not witness.exists()
    loading.load_config(source, _settings(source, trust_remote_code=True))
    assert witness.exists()


def test_code_of_a_tokenizer_is_not_run(base: PolicySource, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    witness = _with_code(
        base,
        folder,
        "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
    )
    source = PolicySource(str(folder))
    with pytest.raises(UserError, match=r"its own code.*trust_remote_code: true"):
        loading.load_tokenizer(source, _settings(source))
    assert not witness.exists()
    loading.load_tokenizer(source, _settings(source, trust_remote_code=True))
    assert witness.exists()


def test_pickled_adapters_are_not_loaded(base: PolicySource, trained: PolicySource, tmp_path: Path) -> None:
    """Nor is the policy quietly the base alone, which peft would only warn of."""
    folder = shutil.copytree(trained.adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    source = PolicySource(base.weights, folder)
    with pytest.raises(UserError, match="safetensors"):
        loading.load_model(source, _settings(source), LORA)


def test_adapters_that_lack_weights(base: PolicySource, trained: PolicySource, tmp_path: Path) -> None:
    folder = shutil.copytree(trained.adapter, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if "layers.1" not in name},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match=r"adapter.* is incomplete: 14 of .*layers\.1\."):
        loading.load_model(PolicySource(base.weights, folder), _settings(base), LORA)


def test_cut_off_adapters(base: PolicySource, trained: PolicySource, tmp_path: Path) -> None:
    folder = shutil.copytree(trained.adapter, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut off"):
        loading.load_model(PolicySource(base.weights, folder), _settings(base), LORA)


def test_another_adapter_than_the_one_in_place(trained: PolicySource) -> None:
    other = LORA.model_copy(update={"r": 8})
    for build in (loading.load_model, loading.on_meta_device):
        with pytest.raises(UserError, match="r is 4, not 8"):
            build(trained, _settings(trained), other)


def test_tied_weights_are_complete(base: PolicySource, tmp_path: Path) -> None:
    """The head is not in the file because it is the embedding; that is no fault."""
    config = loading.load_config(base, _settings(base))
    config.tie_word_embeddings = True
    folder = tmp_path / "tied"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    source = PolicySource(str(folder))
    model = loading.load_model(source, _settings(source), "none")
    assert _counts(loading.on_meta_device(source, _settings(source), "none")) == _counts(model)


def test_gradients_pass_through_quantised_weights_after_they_were_scored(tmp_path):
    """bitsandbytes reorders 4-bit weights in a pass without gradients on some processors, and then has none."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "plain")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=four_bits, dtype=torch.float32
    )
    quantised.save_pretrained(tmp_path / "nf4")
    source = PolicySource(str(tmp_path / "nf4"))
    model = loading.load_model(source, _settings(source), LORA).eval()
    plain = loading.load_model(source, _settings(source), LORA).dequantize().float().eval()
    tokens = torch.arange(12)[None]
    gradients = []
    for each in (model, plain):
        with torch.no_grad():
            each(tokens)
        embedded = each.get_input_embeddings()(tokens).detach().float().requires_grad_(True)
        each(inputs_embeds=embedded, labels=tokens).loss.backward()
        gradients.append(embedded.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)
