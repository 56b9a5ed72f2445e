"""vLLM's side of `sample.vllm_engine`: run by the Python that has vLLM, as a file,
knowing nothing of the rest.

The arguments are the numbers of a socket and of a file in memory, and the folder of the model's description.
Messages are JSON, followed by as many blocks of bytes as it says.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import pickle
import sys
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import MagicMock

# One process: it holds the weights itself and ends with its socket. Of vLLM's two runners the first, whose
# logits processors see every batch. (The script's folder is no place for modules.)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
sys.path[:] = [
    p for p in sys.path if os.path.abspath(p or os.getcwd()) != os.path.dirname(os.path.abspath(__file__))
]

import torch  # noqa: E402

ADAPTERS = "adapters"  # their name in vLLM, and their folder in the model's


class Steering:
    """Where each answer stands in its grammar, as far as it is known here: the tokens that are forced next,
    and then the set that it draws from. What follows a drawn token is asked of the trainer, for all answers
    of a step at once."""

    def __init__(self, link: Connection) -> None:
        self.link = link
        self.sets: dict[int, torch.Tensor] = {}  # by number
        self.next: dict[int, int] = {}  # by answer, the set behind what is forced
        self.forced: dict[int, list[int]] = {}
        self.seen: dict[int, int] = {}  # tokens of an answer whose consequences are known
        self.kept: list[tuple[list[int], list[int], torch.Tensor]] = []  # answers, places, shares

    def begin(self, sets: dict[str, list[int]], first: list[int]) -> None:
        self.sets, self.next, self.kept = {}, dict(enumerate(first)), []
        self.forced, self.seen = {i: [] for i in self.next}, dict.fromkeys(self.next, 0)
        self.know(sets)

    def know(self, sets: dict[str, list[int]]) -> None:
        self.sets |= {int(number): torch.tensor(tokens) for number, tokens in sets.items()}

    def follow(self, rows: dict[int, tuple[int, list[int]]]) -> None:
        """Take note of the tokens that the answers in these rows have gained."""
        drawn = []
        for i, ids in rows.values():
            for token in ids[self.seen[i] :]:
                if self.forced[i]:
                    self.forced[i].pop(0)
                else:
                    drawn.append([i, token])
            self.seen[i] = len(ids)
        if not drawn:
            return
        self.link.send_bytes(json.dumps({"drawn": drawn}).encode())
        reply = json.loads(self.link.recv_bytes())
        self.know(reply["sets"])
        for (i, _), forced, following in zip(drawn, reply["forced"], reply["next"]):
            self.forced[i], self.next[i] = forced, following

    def steer(self, logits: torch.Tensor, rows: dict[int, tuple[int, list[int]]]) -> torch.Tensor:
        """Logits [rows, vocabulary] with those of tokens that are not allowed at -inf; keeps the log of the
        share of probability that the allowed ones have."""
        self.follow(rows)
        order = [r for r in rows if r < len(logits)]
        sets, answers, places = [], [], []
        for r in order:
            i, ids = rows[r]
            forced = self.forced[i]
            sets.append(torch.tensor(forced[:1]) if forced else self.sets[self.next[i]])
            answers.append(i)
            places.append(len(ids))
        lengths = torch.tensor([len(s) for s in sets])
        row = torch.tensor(order).repeat_interleave(lengths).to(logits.device)
        column = torch.cat(sets).to(logits.device)
        steered = torch.full_like(logits, -torch.inf)
        steered[row, column] = logits[row, column]
        share = steered.logsumexp(1) - logits.logsumexp(1)
        self.kept.append((answers, places, share[torch.tensor(order, device=share.device)]))
        return steered

    def shares(self) -> dict[tuple[int, int], float]:
        """By answer and place, of all that was steered."""
        found: dict[tuple[int, int], float] = {}
        for answers, places, share in self.kept:
            found |= zip(zip(answers, places), share.tolist())
        return found


class Model:
    """vLLM's engine over the model that a folder describes; weights come later."""

    def __init__(self, folder: str, fd: int, link: Connection) -> None:
        self.folder, self.version = folder, -1
        self.fd, self.steering = fd, Steering(link)
        self.llm: Any = None
        self.asleep: list[str] = []  # what has no memory now
        self.lora: Any = None
        self.adapters: int | None = None

    def start(self, request: dict[str, Any], blocks: list[bytes]) -> None:
        """Make the engine, its weights yet unset."""
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        register(self.fd, self.folder)
        self.image_id, self.sleeps = request["image_id"], request["sleeps"]
        self.adapters = request["adapters"]
        options: dict[str, Any] = {}
        if self.adapters is not None:
            options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": self.adapters}
        self.llm = LLM(
            model=self.folder,
            dtype=request["dtype"],
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_mm_embeds=True,
            limit_mm_per_prompt={"image": 0, "video": 0},
            enforce_eager=request["eager"],
            max_model_len=request["max_length"],
            max_num_seqs=request["rows"],
            logprobs_mode="raw_logprobs",
            logits_processors=[processor_of(self.steering)],
            async_scheduling=False,
            gpu_memory_utilization=request["memory"],  # without a GPU: of the host's
            weight_transfer_config=WeightTransferConfig(backend=request["transfer"]),
            enable_sleep_mode=self.sleeps is not None,
            seed=0,
            **options,
        )
        self.llm.collective_rpc("init_weight_transfer_engine", args=({"packed": True},))

    def weights(self, request: dict[str, Any], blocks: list[bytes]) -> None:
        """Take the tensors in the buffer: of a GPU's memory, by its handle, or of the shared file."""
        info = {key: request[key] for key in ("names", "dtype_names", "shapes", "tensor_sizes")}
        info["ipc_handles"] = pickle.loads(blocks[0]) if blocks else {}
        self.llm.collective_rpc("update_weights", args=(info,))

    def begin(self, request: dict[str, Any], blocks: list[bytes]) -> None:
        """Weights of a new version follow."""
        self._wake("weights")
        self.llm.collective_rpc("start_weight_update")

    def finish(self, request: dict[str, Any], blocks: list[bytes]) -> None:
        """They are whole."""
        self.llm.collective_rpc("finish_weight_update")
        self._renewed(request["version"])

    def adapt(self, request: dict[str, Any], blocks: list[bytes]) -> None:
        """Read the adapters of a new version."""
        from vllm.lora.request import LoRARequest

        self._wake("weights")
        path = os.path.join(self.folder, ADAPTERS)
        self.lora = LoRARequest(ADAPTERS, 1, path, load_inplace=True)
        self.llm.llm_engine.add_lora(self.lora)
        self.lora = LoRARequest(ADAPTERS, 1, path)
        self._renewed(request["version"])

    def _wake(self, tag: str) -> None:
        if tag in self.asleep:
            self.llm.wake_up([tag])
            self.asleep.remove(tag)

    def _renewed(self, version: int) -> None:
        self._wake("kv_cache")
        self.llm.reset_prefix_cache()  # its keys and values are of the old weights, or went to sleep
        self.version = version

    def generate(self, request: dict[str, Any], blocks: list[bytes]) -> dict[str, Any]:
        """Tokens and log-probabilities of an answer to each prompt, its `vectors` in the places of its
        markers; under a grammar also the log of the share that the allowed tokens had. Memory that sleeps
        since answers before by the same weights wakes first."""
        from vllm import SamplingParams

        if self.asleep:
            if self.sleeps == 2:
                raise RuntimeError("these weights went with the last answers: update before you ask again")
            self._wake("weights")
            self._renewed(self.version)
        vectors = torch.zeros(0)
        if blocks:
            flat = torch.frombuffer(bytearray(blocks[0]), dtype=getattr(torch, request["dtype"]))
            vectors = flat.view(-1, request["width"])
        prompts, first = [], 0
        for ids in request["prompts"]:
            prompt: dict[str, Any] = {"prompt_token_ids": ids}
            if n := ids.count(self.image_id):
                image = {"image_embeds": vectors[first : first + n], "image_grid_thw": GRID.repeat(n, 1)}
                prompt["multi_modal_data"] = {"image": image}
            first += n
            prompts.append(prompt)
        grammar, group = request["grammar"], request["group_size"]
        if grammar is not None:
            self.steering.begin(**grammar)
        banned = dict.fromkeys(request["banned"], -100.0) if grammar is None else None
        params = [
            SamplingParams(
                temperature=1.0,
                top_p=request["top_p"],
                max_tokens=most,
                stop_token_ids=[request["end_id"]],
                ignore_eos=True,
                logit_bias=banned,
                logprobs=0,
                seed=seed,
                detokenize=False,
                extra_args=None if grammar is None else {"answer": i},
            )
            for i, (seed, most) in enumerate(zip(request["seeds"], request["max_tokens"]))
        ]
        found = self.llm.generate(
            [p for p in prompts for _ in range(group)], params, use_tqdm=False, lora_request=self.lora
        )
        shares = {} if grammar is None else self.steering.shares()
        out = []
        for i, answer in enumerate(f.outputs[0] for f in found):
            ids = list(answer.token_ids)
            logprob = [step[token].logprob for token, step in zip(ids, answer.logprobs)]
            out.append({"ids": ids, "logprob": logprob})
            if grammar is not None:
                out[-1]["share"] = [shares[i, k] for k in range(len(ids))]
        if self.sleeps is not None:
            self.llm.sleep(level=self.sleeps)
            self.asleep = ["weights", "kv_cache"]
        return {"answers": out, "cached": sum(f.num_cached_tokens or 0 for f in found)}


# The stock models that have room for our text towers
MODULES = {"Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl", "Qwen3VLForConditionalGeneration": "qwen3_vl"}
GRID = torch.tensor([[1, 2, 2]])  # of patches, four of which become one token


def processor_of(steering: Steering) -> Any:
    """A logits processor of vLLM's kind by which answers keep to their grammar."""
    from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

    class Processor(LogitsProcessor):
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            self.rows: dict[int, tuple[int, list[int]]] = {}  # by row, the answer and its tokens so far

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            if batch_update is None:
                return
            for row in batch_update.removed:
                self.rows.pop(row, None)
            for row, params, _, ids in batch_update.added:
                self.rows.pop(row, None)
                if params.extra_args:
                    self.rows[row] = params.extra_args["answer"], ids
            for one, other, way in batch_update.moved:
                a, b = self.rows.pop(one, None), self.rows.pop(other, None)
                if a is not None:
                    self.rows[other] = a
                if b is not None and way == MoveDirectionality.SWAP:
                    self.rows[one] = b

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            return steering.steer(logits, self.rows) if self.rows else logits

    return Processor


def register(fd: int, folder: str) -> None:
    """Make known to vLLM: weights from the shared file, and prompts whose images are vectors alone, which
    need neither a tokenizer nor an image processor."""
    see_without_torchvision()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.qwen2_vl import Qwen2VLMultiModalDataParser
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.inputs import MultiModalFieldConfig
    from vllm.multimodal.processing import (
        BaseDummyInputsBuilder,
        BaseMultiModalProcessor,
        BaseProcessingInfo,
        PromptReplacement,
    )

    class Info(BaseProcessingInfo):
        def get_supported_mm_limits(self) -> dict[str, int | None]:
            return {"image": None}

        def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Any) -> dict[str, int]:
            return {"image": 1}

        def get_data_parser(self) -> Any:
            return Qwen2VLMultiModalDataParser(2, expected_hidden_size=self._get_expected_hidden_size())

    class Dummy(BaseDummyInputsBuilder):
        def get_dummy_text(self, mm_counts: Any) -> str:
            return ""

        def get_dummy_mm_data(self, seq_len: int, mm_counts: Any, mm_options: Any) -> dict[str, Any]:
            return {}

    class Processor(BaseMultiModalProcessor):
        requires_tokenizer = False

        def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
            tokens = hf_inputs["image_grid_thw"].prod(-1) // 4
            return {
                "image_embeds": MultiModalFieldConfig.flat_from_sizes("image", tokens),
                "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            }

        def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
            marker = [self.info.get_hf_config().image_token_id]
            return [PromptReplacement(modality="image", target=marker, replacement=marker)]

    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        name = json.load(file)["architectures"][0]
    model = getattr(importlib.import_module(f"vllm.model_executor.models.{MODULES[name]}"), name)
    # By class and not by name, which would be looked at in a process that knows nothing of all this.
    ModelRegistry.register_model(name, model)
    MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummy)(model)
    WeightTransferEngineFactory.register_engine("shared", engine_of(fd))


def see_without_torchvision() -> None:
    """Have the models' modules find the names that they import of torchvision. It may be missing, or built
    for another torch (pip's is for CUDA), and no pixel is shown here."""
    try:
        from torchvision.transforms.v2 import functional  # noqa: F401
    except (ImportError, RuntimeError):
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))


def engine_of(fd: int) -> Any:
    """vLLM's own transfer by CUDA IPC, but that the buffer is a file in memory."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    class Engine(IPCWeightTransferEngine):
        def receive_weights(self, update_info: Any) -> None:
            self.model.load_weights(tensors_of(fd, update_info))

    return Engine


def tensors_of(fd: int, info: Any) -> list[tuple[str, torch.Tensor]]:
    """Copies of the tensors that lie in a file one after the other: of a layer of which all has not come
    vLLM keeps what has until then, and the next part is written over this one."""
    size = sum(info.tensor_sizes)
    with mmap.mmap(fd, size) as shared:
        parts = torch.frombuffer(bytearray(shared), dtype=torch.uint8).split(info.tensor_sizes)
    dtypes = [getattr(torch, name) for name in info.dtype_names]
    return [(n, t.view(d).view(shape)) for n, t, d, shape in zip(info.names, parts, dtypes, info.shapes)]


def serve(link: Connection, fd: int, folder: str) -> None:
    """Answer requests about the model in a folder until the other side closes;
    what fails is answered with its error."""
    try:
        import vllm  # noqa: F401  it is what may be missing
    except ImportError as error:
        link.recv_bytes()
        return link.send_bytes(json.dumps({"error": f"{sys.executable} has no vLLM ({error})"}).encode())
    model = Model(folder, fd, link)
    while True:
        try:
            request = json.loads(link.recv_bytes())
        except EOFError:
            return
        blocks = [link.recv_bytes() for _ in range(request["blocks"])]
        try:
            reply = getattr(model, request["do"])(request, blocks) or {}
            link.send_bytes(json.dumps({"version": model.version, **reply}).encode())
        except Exception as error:
            link.send_bytes(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as connection:
        serve(connection, int(sys.argv[2]), sys.argv[3])
