"""The TRL bridge: shapes of prompts and completions, and a real trainer."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rewards_fast.integrations.trl import CIFReward, cif_reward, cif_reward_async
from tests.rewards_fast.cif_texts import SLAB, TARGET

CHAT = [{"role": "assistant", "content": "Sure!\n```cif\n" + SLAB + "```"}]
PARTS = [{"role": "assistant", "content": [{"type": "text", "text": SLAB}]}]


def test_strings_and_chats() -> None:
    completions: list[Any] = [SLAB, CHAT, PARTS, "no idea"]
    rewards = cif_reward(prompts=["?"] * 4, completions=completions, target=[TARGET] * 4, completion_ids=None)
    assert rewards == pytest.approx([10, 10, 10, -15])
    assert all(type(r) is float for r in rewards)


def test_the_prompt_is_the_target_where_no_column_is() -> None:
    prompts: list[Any] = [
        f"{TARGET} Please generate the CIF.",
        [{"role": "user", "content": TARGET}],
        "write a CIF",
    ]
    assert cif_reward(prompts=prompts, completions=[SLAB] * 3) == pytest.approx([10, 10, 4])


def test_counts_come_back_from_a_data_set_with_holes() -> None:
    target = {"Pt": 3, "Cu": 1, "C": 1, "O": 1, "Ni": None}
    assert cif_reward(completions=[SLAB], target=[target]) == pytest.approx([10])


def test_async_and_options() -> None:
    assert asyncio.run(cif_reward_async(completions=[SLAB], target=[TARGET])) == pytest.approx([10])
    assert CIFReward(weights=(0, 1, 0, 0))(completions=["x"], target=[TARGET]) == [-20]


@pytest.mark.parametrize("kind", ["strings", "chat", "async"])
def test_two_steps_of_a_real_trainer(kind: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    words = ["<unk>", "<pad>", "<eos>", "CO</s>Pt3Cu", "data_x", "Pt", "0.5", "loop_", "user", "assistant"]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    config = transformers.Qwen2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, eos_token_id=2, pad_token_id=1, bos_token_id=None,
    )  # fmt: skip
    prompt: Any = TARGET if kind != "chat" else [{"role": "user", "content": TARGET}]
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, num_generations=2, max_completion_length=8,
        report_to=[], use_cpu=True, bf16=False, fp16=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=transformers.Qwen2ForCausalLM(config),
        reward_funcs=cif_reward_async if kind == "async" else cif_reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt, "target": "Pt3CuCO"}] * 8),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 2 and all(-15 <= r <= 10 for r in rewards)
