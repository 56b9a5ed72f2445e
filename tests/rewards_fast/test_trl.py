"""The TRL bridge: shapes of prompts and completions, and a real trainer."""

import asyncio
import pickle
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
    assert CIFReward(comp=0, parse=1, valid=0, phys=0)(completions=["x"], target=[TARGET]) == [-20]
    sent = pickle.loads(pickle.dumps(CIFReward(near=0.7)))
    assert sent.settings.near == 0.7 and sent(completions=[SLAB], target=[TARGET]) == pytest.approx([10])
    with pytest.raises(ValueError, match="CIFReward: unknown key `nearr`; did you mean `near`"):
        CIFReward(nearr=0.7)


def test_a_tools_structure_earns_nothing() -> None:
    loop = [
        {
            "role": "assistant",
            "content": "I ask.",
            "tool_calls": [{"function": {"name": "draw", "arguments": {}}}],
        },
        {"role": "tool", "name": "draw", "content": SLAB},
    ]
    other = SLAB.replace("Cu", "Ni")
    completions: list[Any] = [
        [*loop, {"role": "assistant", "content": other}],
        [*loop, {"role": "assistant", "content": SLAB}],
        [{"role": "assistant", "content": SLAB}, *loop[1:], {"role": "assistant", "content": "Done."}],
        loop,
    ]
    wrong = cif_reward(completions=[other], target=[TARGET])[0]
    assert cif_reward(completions=completions, target=[TARGET] * 4) == pytest.approx([wrong, 10, -15, -15])
    anywhere = CIFReward(answer="any")(completions=completions, target=[TARGET] * 4)
    assert anywhere == pytest.approx([wrong, 10, 10, -15])


def test_where_no_target_is_found_it_is_said_once_counted_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reward = CIFReward()
    logged: list[tuple[str, float]] = []
    for _ in range(2):
        found = reward(
            prompts=["A slab, please.", TARGET],
            completions=[SLAB] * 2,
            composition=["Pt3CuCO", None],
            completion_ids=None,
            log_metric=lambda name, value: logged.append((name, value)),
        )
        assert found == pytest.approx([4, 10])
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "no column 'target', but 'composition'" in caplog.text and "1 of 2 answers" in caplog.text
    assert (reward.missing.missing, reward.missing.seen) == (2, 4)
    assert logged == [("cif_reward/parses", 1.0), ("cif_reward/no_target", 0.5)] * 2
    named = CIFReward(target_column="composition")
    columns: Any = {"composition": ["Pt3CuCO"]}
    assert named(prompts=["?"], completions=[SLAB], **columns) == pytest.approx([10])
    with pytest.raises(ValueError, match="cif_reward: row 0 has no target composition"):
        CIFReward(missing_target="error")(prompts=["?"], completions=[SLAB])
    caplog.clear()
    assert CIFReward(missing_target="ignore")(completions=[SLAB]) == pytest.approx([4])
    assert CIFReward(comp=0)(completions=[SLAB]) == pytest.approx([4])  # no composition is asked for
    assert not caplog.records


def test_an_example_of_the_system_prompt_is_not_the_target() -> None:
    chat = [{"role": "system", "content": "Like NH</s>Fe4 (1 1 0)."}, {"role": "user", "content": TARGET}]
    prompts: list[Any] = [chat]
    assert cif_reward(prompts=prompts, completions=[SLAB]) == pytest.approx([10])
    assert cif_reward(prompts=prompts, completions=[SLAB], target=[None]) == pytest.approx([10])


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
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}{% if add_generation_prompt "
        "%}assistant {% endif %}"
    )
    config = transformers.Qwen2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, eos_token_id=2,
        pad_token_id=1, bos_token_id=None,
    )  # fmt: skip
    prompt: Any = TARGET if kind != "chat" else [{"role": "user", "content": TARGET}]
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, num_generations=2,
        max_completion_length=8, report_to=[], use_cpu=True, bf16=False, fp16=False, logging_steps=1,
        save_strategy="no", disable_tqdm=True,
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
