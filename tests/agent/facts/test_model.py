"""Model directories: published ones by their config.json, small ones with files, and broken ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.agent.facts.checkpoints import model, safetensors
from xim_agent.facts.model import (
    CountSource,
    LayerFacts,
    LinearAttention,
    LinearKind,
    MlaFacts,
    ModelFacts,
    ModelUnreadable,
    MoeFacts,
    QuantizationFacts,
    RopeFacts,
)
from xim_agent.facts.read_model import read_model

TESTS = Path(__file__).parents[1]
TINY = Path(__file__).parents[3] / "demo" / "model" / "xim-tiny"
PUBLISHED = sorted(directory for directory in (TESTS / "models").iterdir() if (directory / "config.json").exists())


def published(name: str) -> ModelFacts:
    return read_model(TESTS / "models" / name)


def test_twenty_four_models_are_described() -> None:
    assert len(PUBLISHED) == 24


@pytest.mark.parametrize("directory", PUBLISHED, ids=lambda directory: directory.name)
def test_every_published_model_survives_the_way_through_json(directory: Path) -> None:
    facts = read_model(directory)
    assert facts.parameters_source is CountSource.CONFIG
    assert ModelFacts.from_json(json.dumps(facts.to_json())) == facts


@pytest.mark.parametrize(
    ("name", "billions", "digits"),
    [
        ("asclepius-13b-gptq", 13, 0),
        ("deepseek-v3", 671, 0),
        ("glm-4.5-air", 107, 0),
        ("gpt-oss-20b", 20.9, 1),
        ("gemma-3-27b-it", 27, 0),
        ("llama-3.1-70b", 70.6, 1),
        ("llama-3.1-70b-fp8", 70.6, 1),
        ("llama-3.1-8b", 8.03, 2),
        ("llama-3.2-1b-instruct", 1.24, 2),
        ("mammoth-7b-awq", 6.74, 2),
        ("mimo-7b-base", 7.6, 1),
        ("mixtral-8x7b", 46.7, 1),
        ("nemotron-h-56b", 56, 0),
        ("qwen3-30b-a3b", 30.5, 1),
        ("qwen3-30b-a3b-fp8", 30.5, 1),
        ("qwen3-8b", 8.2, 1),
        ("qwen3-embedding-0.6b", 0.6, 1),
        ("qwen3-next-80b-a3b", 80, 0),
        ("qwen3.5-27b", 27, 0),
        ("qwen3.5-35b-a3b", 35, 0),
        ("qwen3.5-9b", 9, 0),
    ],
)
def test_the_computed_count_is_the_published_one(name: str, billions: float, digits: int) -> None:
    parameters = published(name).parameters
    assert parameters is not None
    assert round(parameters / 1e9, digits) == billions


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gemma-3-27b-it", 27_009_346_304),
        ("glm-4.7", 352_797_814_784 + 89 * 160),  # and the router's biases, which are no parameters there
        ("qwen3-next-80b-a3b", 79_674_391_296),
        ("qwen3.5-9b", 8_953_803_264),
        ("qwen3.5-27b", 26_895_998_464),
        ("qwen3.5-35b-a3b", 34_660_610_688),
    ],
)
def test_the_computed_count_is_that_of_the_modules_in_transformers(name: str, parameters: int) -> None:
    # Counted in transformers 5.19: the text model built from the same config.json on the meta device.
    assert published(name).parameters == parameters


def test_a_mixture_with_latent_attention() -> None:
    facts = published("deepseek-v3")
    assert facts.mla == MlaFacts(kv_lora_rank=512, qk_rope_head_dim=64)
    assert facts.moe == MoeFacts(experts=256, experts_per_token=8, intermediate_size=2048, shared_experts=1)
    assert facts.rope == RopeFacts(kind="yarn", factor=40.0, original_max_position_embeddings=4096)
    assert facts.quantization == QuantizationFacts(method="fp8", bits=8, weight_format="float")
    assert (facts.mtp_layers, facts.layers, facts.context_limit) == (1, LayerFacts(full=61), 163840)


def test_a_hybrid_with_nested_text_config() -> None:
    facts = published("qwen3.5-9b")
    assert (facts.model_type, facts.text_model_type) == ("qwen3_5", "qwen3_5_text")
    assert facts.architectures == ("Qwen3_5ForConditionalGeneration",)
    assert facts.layers == LayerFacts(full=8, linear=24)
    assert facts.linear == LinearAttention(
        kind=LinearKind.GDN,
        key_heads=16,
        value_heads=32,
        key_head_dim=128,
        value_head_dim=128,
        conv_kernel=4,
        state_dtype="float32",
    )
    assert (facts.mtp_layers, facts.multimodal, facts.dtype, facts.layer_count) == (1, True, "bfloat16", 32)


def test_a_hybrid_told_by_its_interval() -> None:
    facts = published("qwen3-next-80b-a3b")
    assert (facts.layers, facts.mtp_layers) == (LayerFacts(full=12, linear=36), 0)
    assert facts.moe == MoeFacts(experts=512, experts_per_token=10, intermediate_size=512, shared_experts=1)


def test_a_hybrid_told_in_letters() -> None:
    facts = published("nemotron-h-56b")
    assert facts.layers == LayerFacts(full=10, linear=54)
    assert facts.linear is not None
    assert (facts.linear.kind, facts.head_dim) == (LinearKind.MAMBA, 128)


def test_a_sliding_window_with_what_transformers_leaves_out() -> None:
    facts = published("gemma-3-4b-it")
    assert (facts.layers, facts.sliding_window) == (LayerFacts(full=5, sliding=29), 1024)
    assert (facts.attention_heads, facts.kv_heads, facts.head_dim) == (8, 4, 256)
    assert (facts.context_limit, facts.vocab_size) == (131072, 262208)


def test_layer_types_by_name_and_four_bits_by_name() -> None:
    facts = published("gpt-oss-20b")
    assert (facts.layers, facts.sliding_window) == (LayerFacts(full=12, sliding=12), 128)
    assert facts.quantization == QuantizationFacts(method="mxfp4", bits=4, group_size=32, weight_format="float")


def test_an_encoder_keeps_nothing_between_tokens(tmp_path: Path) -> None:
    assert published("bge-base-en-v1.5").layer_count == 0
    both_ways = json.loads((TESTS / "models" / "qwen3-embedding-0.6b" / "config.json").read_text()) | {
        "is_causal": False
    }
    (tmp_path / "config.json").write_text(json.dumps(both_ways))
    assert (read_model(tmp_path).layer_count, published("qwen3-embedding-0.6b").layer_count) == (0, 28)


def test_a_head_that_is_the_embedding_is_told() -> None:
    tied = {name: published(name).tied_embeddings for name in ("gemma-3-27b-it", "llama-3.2-1b-instruct", "qwen3-8b")}
    assert tied == {"gemma-3-27b-it": True, "llama-3.2-1b-instruct": True, "qwen3-8b": False}


def test_an_unused_window_is_none() -> None:
    facts = published("mimo-7b-base")
    assert (facts.sliding_window, facts.layers, facts.mtp_layers) == (None, LayerFacts(full=36), 1)


def test_an_embedding_model_is_seen_by_its_files_or_its_architecture() -> None:
    assert published("qwen3-embedding-0.6b").pooling
    assert published("bge-base-en-v1.5").pooling
    assert not published("qwen3-8b").pooling


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("mammoth-7b-awq", QuantizationFacts(method="awq", bits=4, group_size=128, weight_format="int")),
        (
            "asclepius-13b-gptq",
            QuantizationFacts(method="gptq", bits=4, group_size=128, weight_format="int", grouped_by_activation=True),
        ),
        ("llama-3.1-70b-fp8", QuantizationFacts(method="modelopt", bits=8, weight_format="float", kv_cache_bits=8)),
        ("llama-3.1-8b", None),
    ],
)
def test_published_quantisation_is_read(name: str, facts: QuantizationFacts | None) -> None:
    assert published(name).quantization == facts


GROUP = {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}
ACTIVATIONS_ONLY = {"weights": None, "input_activations": {"num_bits": 8}}


@pytest.mark.parametrize(
    ("described", "facts"),
    [
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": ACTIVATIONS_ONLY, "group_1": GROUP}},
            QuantizationFacts(method="compressed-tensors", bits=4, group_size=128, weight_format="int"),
        ),
        (
            {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}},
            QuantizationFacts(method="compressed-tensors", kv_cache_bits=8),
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            QuantizationFacts(method="bitsandbytes", bits=4, weight_format="nf4"),
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            QuantizationFacts(method="bitsandbytes", bits=8, weight_format="int"),
        ),
        ({"quant_method": "bitsandbytes"}, QuantizationFacts(method="bitsandbytes", weight_format="int")),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
            QuantizationFacts(method="modelopt_fp4", bits=4, group_size=16, weight_format="float"),
        ),
        (
            {"quant_method": "GPTQ", "bits": 8, "group_size": -1, "desc_act": True},
            QuantizationFacts(method="gptq", bits=8, weight_format="int"),
        ),
        ({"quant_method": "hqq"}, QuantizationFacts(method="hqq")),
        ({"bits": 5, "group_size": 64}, QuantizationFacts(method="unknown", bits=5, group_size=64)),
    ],
)
def test_other_quantisation_is_read(tmp_path: Path, described: dict[str, Any], facts: QuantizationFacts) -> None:
    assert read_model(model(tmp_path, quantization_config=described)).quantization == facts


@pytest.mark.parametrize(
    ("file", "text", "method"),
    [
        ("quantize_config.json", '{"bits": 4, "group_size": 128}', "gptq"),
        ("quant_config.json", '{"w_bit": 4, "q_group_size": 128}', "awq"),
    ],
)
def test_quantisation_beside_the_config_is_found(tmp_path: Path, file: str, text: str, method: str) -> None:
    (model(tmp_path) / file).write_text(text)
    assert read_model(tmp_path).quantization == QuantizationFacts(
        method=method, bits=4, group_size=128, weight_format="int"
    )


def test_the_demo_model_is_counted_by_its_files() -> None:
    facts = read_model(TINY)
    assert (facts.parameters, facts.parameters_source, facts.weights_dtype) == (918656, CountSource.SAFETENSORS, "F32")
    assert facts.checkpoint_bytes == 918656 * 4
    assert facts.has_tokenizer
    assert facts.has_chat_template


def test_files_win_over_the_config(tmp_path: Path) -> None:
    (model(tmp_path) / "model.safetensors").write_bytes(safetensors({"a": ("BF16", (10, 10))}))
    facts = read_model(tmp_path)
    assert (facts.parameters, facts.checkpoint_bytes) == (100, 200)


def test_pytorchs_files_are_as_large_as_they_are(tmp_path: Path) -> None:
    (model(tmp_path) / "pytorch_model-00001.bin").write_bytes(bytes(7))
    assert (read_model(tmp_path).checkpoint_bytes, read_model(tmp_path).weights_dtype) == (7, None)


def test_a_family_that_is_not_listed_has_no_count(tmp_path: Path) -> None:
    facts = read_model(model(tmp_path, model_type="brand_new"))
    assert (facts.parameters, facts.parameters_source) == (None, None)


def test_a_shape_that_is_left_out_ends_the_count_and_not_the_reading(tmp_path: Path) -> None:
    assert read_model(model(tmp_path, intermediate_size=None)).parameters is None


def test_a_nested_config_may_leave_out_what_equals_the_defaults(tmp_path: Path) -> None:
    text = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064}
    facts = read_model(
        model(tmp_path, {"model_type": "llava", "text_config": text, "vision_config": {"model_type": "clip"}})
    )
    assert (facts.hidden_size, facts.layers.full, facts.kv_heads, facts.vocab_size) == (4096, 32, 32, 32064)
    assert (facts.text_model_type, facts.multimodal) == ("llama", True)


def test_null_in_a_nested_config_is_no_default(tmp_path: Path) -> None:
    text = {"model_type": "mistral", "sliding_window": None}
    assert read_model(model(tmp_path, {"model_type": "llava_next", "text_config": text})).sliding_window is None


def test_heads_sizes_and_names_of_older_families(tmp_path: Path) -> None:
    facts = read_model(
        model(
            tmp_path,
            {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 3, "n_positions": 1024, "vocab_size": 50257},
        )
    )
    assert (facts.kv_heads, facts.head_dim, facts.layers.full, facts.context_limit) == (12, 64, 3, 1024)


def test_mtp_layers_that_only_the_files_show(tmp_path: Path) -> None:
    (model(tmp_path) / "model.safetensors").write_bytes(safetensors({"mtp.fc.weight": ("BF16", (2, 2))}))
    assert read_model(tmp_path).mtp_layers == 1


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, LayerFacts(full=0, sliding=4)),
        ({"model_type": "mistral", "sliding_window": None}, LayerFacts(full=4)),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": False}, LayerFacts(full=4)),
        (
            {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3},
            LayerFacts(full=3, sliding=1),
        ),
        ({"model_type": "llama", "sliding_window": 9}, LayerFacts(full=4)),
        ({"model_type": "gemma2", "sliding_window": 9}, LayerFacts(full=2, sliding=2)),
        ({"sliding_window": 9, "sliding_window_pattern": 4}, LayerFacts(full=1, sliding=3)),
        ({"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 1}, LayerFacts(full=1, linear=3)),
        ({"model_type": "bamba", "attn_layer_indices": [0, 3]}, LayerFacts(full=2, linear=2)),
        ({"model_type": "mamba2", "num_attention_heads": None}, LayerFacts(full=0, linear=4)),
        ({"layer_types": ["mamba", "attention", "mamba", "mamba"]}, LayerFacts(full=1, linear=3)),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, LayerFacts(full=4)),
        ({"layer_types": ["quite_new", "conv", "full_attention", "mamba", "mtp"]}, LayerFacts(full=2, linear=2)),
        ({"hybrid_override_pattern": "M-*E|?M"}, LayerFacts(full=2, linear=2)),
    ],
)
def test_every_way_of_saying_what_layers_keep(tmp_path: Path, changes: dict[str, Any], layers: LayerFacts) -> None:
    assert read_model(model(tmp_path, num_hidden_layers=4, **changes)).layers == layers


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, 2048),
        ({"rope_type": "default"}, 2048),
        ({"type": "linear", "factor": 4.0}, 8192),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "deepseek_yarn", "factor": 4.0}, 2048),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "longrope", "factor": 8.0}, 2048),
        ({"type": "mrope", "mrope_section": [1, 2]}, 2048),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {}}, 4096),
    ],
)
def test_the_positions_limit_the_context_as_in_vllm(tmp_path: Path, rope: object, limit: int) -> None:
    assert read_model(model(tmp_path, rope_scaling=rope)).context_limit == limit


@pytest.mark.parametrize("name", ["tokenizer.json", "hy.tiktoken", "tokenizer.model.v3"])
def test_every_kind_of_tokenizer_is_found(tmp_path: Path, name: str) -> None:
    """Some have nothing but a .tiktoken beside the code that reads it, as Qwen's first models."""
    directory = model(tmp_path)
    assert not read_model(directory).has_tokenizer
    (directory / name).write_text("")
    assert read_model(directory).has_tokenizer


def test_no_positions_no_limit(tmp_path: Path) -> None:
    assert read_model(model(tmp_path, max_position_embeddings=None)).context_limit is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": None}, "it has no num_hidden_layers"),
        ({"hidden_size": 0}, "it has no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64', which is not a whole number"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
        ({"model_type": 7}, "model_type is 7, which is not a string"),
        ({"architectures": "Llama"}, "architectures is not a list of strings"),
        ({"rope_scaling": "linear"}, "rope_scaling is not an object"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor is inf"),
        ({"layer_types": ["full_attention"]}, "it names 1 layer types for 2 layers"),
        ({"quantization_config": {"quant_method": "awq", "bits": "4"}}, "bits is '4'"),
        ({"quantization_config": {"quant_method": "awq", "group_size": True}}, "group_size is True"),
        ({"use_sliding_window": "no", "sliding_window": 9}, "use_sliding_window is 'no'"),
        ({"attn_layer_indices": [1, "2"]}, "attn_layer_indices is not a list of whole numbers"),
        ({"num_key_value_heads": [2, "2"]}, "which is not a whole number"),
        ({"num_key_value_heads": []}, "which is not a whole number"),
        ({"max_position_embeddings": 10**30}, "which is not a whole number"),
        ({"num_hidden_layers": 10**12}, "it has 1000000000000 layers, more than any model"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelUnreadable, match=said) as fault:
        read_model(model(tmp_path, **changes))
    assert fault.value.file == tmp_path / "config.json"
    assert "Fetch the model again" in fault.value.remedy


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "not JSON"), (b"\xff", "not JSON"), (b"[1]", "not a JSON object"), (b"[" * 99999, "JSON")],
)
def test_a_broken_config_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelUnreadable, match=said):
        read_model(tmp_path)


def test_a_wrong_value_is_quoted_at_no_length(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable) as fault:
        read_model(model(tmp_path, hidden_size="9" * 100_000))
    assert len(str(fault.value)) < 1_000


@pytest.mark.parametrize(
    ("changes", "moe"),
    [
        (  # HunYuan-A13B: a number for each layer
            {"num_experts": 64, "moe_topk": [8, 8], "moe_intermediate_size": [3072, 3072], "n_shared_experts": [1, 1]},
            MoeFacts(experts=64, experts_per_token=8, intermediate_size=3072, shared_experts=1),
        ),
        (  # ERNIE-4.5-VL: one for text and one for images
            {"moe_num_experts": [64, 64], "moe_intermediate_size": [1536, 512], "num_experts_per_tok": 6},
            MoeFacts(experts=64, experts_per_token=6, intermediate_size=1536),
        ),
    ],
)
def test_of_a_number_for_each_layer_the_largest_counts(tmp_path: Path, changes: dict[str, Any], moe: MoeFacts) -> None:
    assert read_model(model(tmp_path, **changes)).moe == moe


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({"model_type": "falcon", "multi_query": True}, 1),
        ({"model_type": "falcon", "multi_query": True, "new_decoder_architecture": True}, 2),
        ({"model_type": "falcon", "multi_query": False}, 2),
        ({"num_key_value_heads": None, "num_attention_groups": 2}, 2),
        ({"num_key_value_heads": None}, 4),
    ],
)
def test_heads_that_share_keys_and_values_count_as_in_vllm(tmp_path: Path, changes: dict[str, Any], heads: int) -> None:
    assert read_model(model(tmp_path, **changes)).kv_heads == heads


def test_a_link_to_nothing_in_the_place_of_weights_is_named(tmp_path: Path) -> None:
    """A snapshot of a hub's cache is made of links; its blobs may be gone, or another user's."""
    (model(tmp_path) / "pytorch_model.bin").symlink_to("blobs/gone")
    with pytest.raises(ModelUnreadable, match=r"pytorch_model\.bin: it cannot be read: No such file"):
        read_model(tmp_path)


def test_a_file_that_cannot_even_be_looked_for_is_none(tmp_path: Path) -> None:
    """What `Path.exists` raises for: here a name that is too long, else a directory that may not be searched."""
    names = (
        "tokenizer.json",
        "modules.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "quant_config.json",
    )
    for name in names:
        (tmp_path / name).symlink_to("x" * 300)
    facts = read_model(model(tmp_path))
    assert (facts.has_tokenizer, facts.pooling, facts.has_chat_template, facts.quantization) == (
        False,
        False,
        False,
        None,
    )
    with pytest.raises(ModelUnreadable, match="it is not a directory"):
        read_model(tmp_path / ("x" * 300))


def test_a_device_in_the_place_of_the_config_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ModelUnreadable, match=r"config\.json: it is no file"):
        read_model(tmp_path)


def test_a_config_that_is_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(17 * 1024**2)
    with pytest.raises(ModelUnreadable, match="more than the"):
        read_model(tmp_path)


def test_a_missing_config_and_a_missing_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match=r"config\.json: it is not there"):
        read_model(tmp_path)
    with pytest.raises(ModelUnreadable, match="it is not a directory"):
        read_model(tmp_path / "gone")


def test_a_broken_tokenizer_config_is_named(tmp_path: Path) -> None:
    (model(tmp_path) / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelUnreadable, match=r"tokenizer_config\.json"):
        read_model(tmp_path)


def test_a_description_that_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="does not describe a model: hidden_size"):
        ModelFacts.from_json(json.dumps({**published("qwen3-8b").to_json(), "hidden_size": "x"}))
