"""Keys and values of a segment in vLLM, a kind of cache of its own: a request holds blocks of the segments it runs."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class SegmentSpec(FullAttentionSpec):
    """Keys and values of full attention in the layers of one segment, which starts at `first_layer` (from 0)."""

    first_layer: int

    @classmethod
    def of(cls, spec: KVCacheSpec, first_layer: int) -> "SegmentSpec":
        if type(spec) is not FullAttentionSpec:
            raise ValueError(f"A depth a request takes layers with full attention, got {type(spec).__name__}.")
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec)}, first_layer=first_layer)

    @classmethod
    def merge(cls, specs: list["SegmentSpec"]) -> "SegmentSpec":  # type: ignore[override]
        # vLLM tries to merge all, and takes this for a no
        assert len({spec.first_layer for spec in specs}) == 1, "layers of two segments have blocks of their own"
        return cls.of(FullAttentionSpec.merge([spec.as_full_attention() for spec in specs]), specs[0].first_layer)

    def as_full_attention(self) -> FullAttentionSpec:
        values = {field.name: getattr(self, field.name) for field in fields(FullAttentionSpec)}
        return FullAttentionSpec(**values)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, SegmentSpec) and spec.first_layer == self.first_layer for spec in kv_cache_specs.values()
        )


class SegmentManager(FullAttentionManager):
    """The blocks of a segment: a request that ends below it has none, finds none, and leaves none to be found."""

    exit_layer_of: Callable[[str], int]  # by request; the scheduler sets it
    looked_up: ClassVar[int | None] = None  # exit layer of the request whose prefix is looked up, by class in vLLM

    def _is_run_by(self, request_id: str) -> bool:
        return self.exit_layer_of(request_id) > self.kv_cache_spec.first_layer

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        return super().get_num_blocks_to_allocate(request_id, *args, **kwargs) if self._is_run_by(request_id) else 0

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> list:
        return super().allocate_new_blocks(request_id, *args, **kwargs) if self._is_run_by(request_id) else []

    def cache_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        if self._is_run_by(request.request_id):
            super().cache_blocks(request, *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(cls, block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, **kwargs):
        if cls.looked_up is not None and cls.looked_up <= kv_cache_spec.first_layer:
            return tuple([] for _ in kv_cache_group_ids), max_length  # it needs none, whatever is there
        return super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, **kwargs
        )


# vLLM registers its own kinds at the first question, and not at all where it finds one registered
KVCacheSpecRegistry.check_kv_cache_spec_registry({})
KVCacheSpecRegistry.register(SegmentSpec, SegmentManager, SegmentSpec)
