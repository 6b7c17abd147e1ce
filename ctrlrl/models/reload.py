"""New weights into a live vLLM engine: a WeightMessage through vLLM's weight-transfer protocol, every element of the engine's own weights
accounted for. vLLM loads layer by layer into fresh tensors, counts what each layer gets, and puts the results into the old places.
"""

import ctypes
from dataclasses import dataclass, field

from torch import nn

from ctrlrl.errors import VersionMismatch
from ctrlrl.models.handover import Part
from ctrlrl.models.weights import WeightMessage

TRANSFER = "ctrlrl"  # the protocol's name of the backend below
# malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
_KEPT = {-4: 0, -1: 2**31 - 1, -2: 64 << 20}


def register_transfer() -> None:
    """Teach vLLM's weight transfer to read a WeightMessage."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if TRANSFER in WeightTransferEngineFactory._registry:
        return

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        pass

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        message: list = field(default_factory=list)

    class MessageEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
        init_info_cls, update_info_cls = InitInfo, UpdateInfo

        open = whole = False  # between start and finish; after the last part of a message: whether it was all

        def init_transfer_engine(self, init_info):
            self.reload = Reload(self.model, self.model_config)

        def start_weight_update(self):
            self.reload.begin()
            self.open = True

        def receive_weights(self, update_info):
            message = update_info.message[0]
            if isinstance(message, Part):
                self.whole = self.reload.read_part(message)
            else:
                self.reload.read(message)

        def finish_weight_update(self):
            self.reload.finish()
            self.open = False

        def shutdown(self):
            pass

    WeightTransferEngineFactory.register_engine(TRANSFER, MessageEngine)


class Reload:
    """Replaces the weights of a vLLM model: begin, read, finish."""

    def __init__(self, model: nn.Module, config):
        self._model, self._config = model, config
        self._direct: list[nn.Module] = []  # layers that the model's own code writes to, past vLLM's counting
        self._past: list[nn.Module] = []  # those of them that this message has shown
        self._paths = {layer: path for path, layer in model.named_modules()}
        self._unpacked: dict[nn.Module, object] = {}  # embeddings and heads, whose methods are set aside

    def begin(self) -> None:
        """Set the present weights aside and make empty places for new ones."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
        from vllm.model_executor.model_loader.reload.meta import materialize_layer

        _forget_cpu_experts(self._model)
        for layer in _vocabularies(self._model):
            self._unpacked.setdefault(layer, layer.quant_method)
            layer.quant_method = None  # which vLLM would have pack them
        initialize_layerwise_reload(self._model)
        self._past = []
        for layer in self._direct:
            materialize_layer(layer, _info(layer))

    def read(self, message: WeightMessage) -> None:
        """Load a message; VersionMismatch, with the names, if some of the model's weights got no or too few values from it."""
        self._load(message)
        while not self._complete(message.version):
            self._load(message)

    def read_part(self, part: Part) -> bool:
        """The same for a part of one, the first of which begins anew. After the last: whether all is there; else all parts have to come
        once more."""
        if part.first:
            self.begin()
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        with disable_mtp_completeness_check():
            self._load(part)
        return part.last and self._complete(part.version)

    def _load(self, weights: WeightMessage | Part) -> None:
        taken = self._model.load_weights(weights.tensors()) or set()
        self._past += [layer for layer in self._waiting() if layer not in self._direct + self._past and self._own(layer) & taken]

    def _complete(self, version: int) -> bool:
        """Whether all layers have their values; not if some were written to with nothing there to be written to. They are known from here
        on, and it has begun anew."""
        if self._past:
            self._direct += self._past
            self.begin()
            return False
        missing = sorted({name for layer in self._waiting() if layer not in self._direct for name in self._own(layer)} | self._partly())
        if missing:
            raise VersionMismatch(
                f"weights of version {version} leave {len(missing)} of the rollout engine's own without values, such as "
                f"{missing[0]!r}: publish the whole model; if it was whole, the engine does not know how to take it"
            )
        return True

    def finish(self) -> None:
        """Put what was read where the engine looks for it."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process

        for layer in self._direct:
            _layerwise_process(layer, _info(layer))
        finalize_layerwise_reload(self._model, self._config)
        for layer, method in self._unpacked.items():
            layer.quant_method = method
            _pack_when_used(layer)
        self._unpacked = {}

    def _waiting(self) -> list[nn.Module]:
        """Layers that were given nothing so far, but for those whose weights are another's that was."""
        waiting = [layer for layer in self._model.modules() if _info(layer).can_load() and not _info(layer).load_numel]
        had = {id(p) for layer in self._model.modules() if layer not in waiting for p in layer._parameters.values()}
        had |= {id(p) for layer in self._model.modules() if layer not in waiting and _info(layer).can_load() for p in _before(layer)}
        return [layer for layer in waiting if any(id(p) not in had for p in _before(layer))]

    def _partly(self) -> set[str]:
        """Names of layers that were given less than they hold, but for rows that only fill a vocabulary up to an even number."""
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        return {
            name
            for name, layer in self._model.named_modules()
            if _info(layer).can_load() and 0 < _info(layer).load_numel < _info(layer).load_numel_total
            if not isinstance(layer, VocabParallelEmbedding)
        }

    def _own(self, layer: nn.Module) -> set[str]:
        """Names in the model of a layer's own parameters."""
        return {f"{self._paths[layer]}.{name}" for name, parameter in layer.named_parameters(recurse=False) if parameter.numel()}


def leave_transformers_usable(model: nn.Module) -> None:
    """vLLM runs some models by transformers' own classes and changes how these are called: others of them in this process ask for an
    attribute that only vLLM's have."""
    for module in model.modules():
        if type(module).__module__.startswith("transformers.") and "do_not_compile" in vars(module):
            type(module).do_not_compile = True


def _info(layer: nn.Module):
    """What vLLM counts about a layer while it is loaded."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return get_layerwise_info(layer)


def _before(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters that a layer which is being loaded had, and gets back."""
    return [p for p in _info(layer).kernel_tensors[0].values() if p.numel()]


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _forget_cpu_experts(model: nn.Module) -> None:
    """On CPU vLLM prepacks experts together with making their kernel, which it does once: without one, a reload makes it anew."""
    for module in model.modules() if _on_cpu() else ():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _vocabularies(model: nn.Module) -> list[nn.Module]:
    """On CPU, the embeddings and heads that vLLM has packed for products: all of them, although most embeddings are only looked up in,
    and a tied head before its embedding is loaded, so that it would stay on its old copy."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    embeddings = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    return [layer for layer in embeddings if hasattr(layer, "cpu_linear")] if _on_cpu() else []


def _pack_when_used(layer: nn.Module) -> None:
    """Have a layer packed at the first product with it."""

    def first(*given):
        layer.quant_method.process_weights_after_loading(layer)  # which sets cpu_linear
        return layer.cpu_linear(*given)

    layer.cpu_linear = first


def keep_freed_memory() -> None:
    """Have this process's allocator (glibc's) keep what is freed: a publish frees and takes as much as all weights, and to have the system
    take back the pages and clear new ones is half of what it costs."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter, value in _KEPT.items() if mallopt else ():
        mallopt(parameter, value)
