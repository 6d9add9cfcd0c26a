"""The least source text that has every seam of vLLM: what ``survey`` must find, and no more."""

SCHEDULER = {
    "vllm.v1.core.block_pool": """
from vllm.v1.core.kv_cache_utils import (
    FreeKVCacheBlockQueue,
    KVCacheBlock,
)

class BlockPool:
    def __init__(self, num_gpu_blocks: int, enable_caching: bool, **more):
        self.free_block_queue = FreeKVCacheBlockQueue([])

    def reset_prefix_cache(self) -> bool: ...

    def get_usage(self) -> float: ...

    def _maybe_evict_cached_block(self, block: KVCacheBlock) -> bool: ...
""",
    "vllm.v1.core.kv_cache_utils": """
class KVCacheBlock: ...

class FreeKVCacheBlockQueue:
    def __init__(self, blocks): ...
    def popleft(self): ...
    def popleft_n(self, n): ...
    def remove(self, block): ...
    def append(self, block): ...
    def append_n(self, blocks): ...
    def prepend_n(self, blocks): ...
    def get_all_free_blocks(self): ...
""",
    "vllm.v1.core.kv_cache_coordinator": """
class KVCacheCoordinator(ABC):
    def get_num_blocks_to_allocate(self, request_id, num_tokens, *, cap=False): ...
""",
    "vllm.v1.core.sched.scheduler": """
class Scheduler(SchedulerInterface):
    def schedule(self): ...
    def update_from_output(self, scheduler_output, model_runner_output): ...
    def finish_requests(self, request_ids, finished_status): ...
""",
}
WORKER = {
    "vllm.v1.worker.worker_base": """
from vllm.utils.import_utils import resolve_obj_by_qualname

class WorkerBase:
    def __init__(self, vllm_config, local_rank, rank, distributed_init_method): ...
""",
    "vllm.v1.worker.gpu_worker": """
from .utils import request_memory as request_memory
from vllm.v1.worker.worker_base import WorkerBase

class Worker(WorkerBase):
    def determine_available_memory(self) -> int: ...
    def get_kv_cache_spec(self): ...
""",
}
_UTILS = """
def request_memory(init_snapshot, cache_config, *more): ...
"""
LAYOUT = {
    "vllm.v1.worker.utils": f"""{_UTILS}
def allocate_kv_cache(kv_cache_config, device, layout, kernel_block_sizes=None): ...
""",
    "vllm.v1.kv_cache_interface": """
def create_kv_cache_views(
    raw, spec, num_blocks, layout, kv_cache_tensor, kernel_block_size=None
): ...
""",
}
PACKED = {
    "vllm.v1.worker.gpu_model_runner": """
class GPUModelRunner:
    def _allocate_kv_cache_tensors(self, kv_cache_config): ...
""",
    "vllm.v1.worker.gpu.attn_utils": """
def _allocate_kv_cache(kv_cache_config, shared_layers, device): ...
""",
}
NEW = {**SCHEDULER, **WORKER, **LAYOUT}
OLD = {**SCHEDULER, **WORKER, **PACKED, "vllm.v1.worker.utils": _UTILS}
