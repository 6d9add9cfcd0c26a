"""One engine: phases of requests; prints tokens, and memory as the kernel counts it, as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def memory_of_workers():
    """Bytes of kvcached's memory files that this process's descendants hold."""
    total = 0
    for pid in descendants(os.getpid()):
        folder = f"/proc/{pid}/fd"
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for name in names:
            try:
                if os.readlink(f"{folder}/{name}").startswith("/memfd:kvcached"):
                    total += os.stat(f"{folder}/{name}").st_blocks * 512
            except OSError:
                continue
    return total


def descendants(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            children = [int(child) for child in file.read().split()]
    except OSError:
        return []
    return children + [p for child in children for p in descendants(child)]


def tenants():
    done = subprocess.run([sys.executable, "-m", "kvcached", "ps", "--json"], check=True,
                          capture_output=True, text=True)  # fmt: skip
    return [t for device in json.loads(done.stdout)["devices"] for t in device["tenants"]]


def prompts_of(phase, count):
    return [f"phase {phase} request {i} " + "the quick brown fox " * (5 + i % 37)
            for i in range(count)]  # fmt: skip


def main():
    from vllm import LLM, SamplingParams

    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    llm = LLM(model=job["model"], seed=0, **job["engine"])
    elastic = os.environ.get("KVCACHED", "0") != "0"
    result = {"phases": []}
    try:
        for number, (count, length) in enumerate(job["phases"]):
            greedy = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            texts = job["texts"][number] if job["texts"] else prompts_of(number, count)
            outs = llm.generate(texts, greedy, use_tqdm=False)
            busy = memory_of_workers()
            time.sleep(job.get("settle", 1.5))
            result["phases"].append({
                "tokens": [list(out.outputs[0].token_ids) for out in outs],
                "texts": [out.outputs[0].text for out in outs],
                "busy_bytes": busy, "idle_bytes": memory_of_workers(),
                "tenants": tenants() if elastic else [],
            })  # fmt: skip
        result["sleeps"] = [nap(llm, job, level) for level in job.get("sleep", ())]
        result["preempted"] = counter(llm, "vllm:num_preemptions")
    finally:
        llm.llm_engine.engine_core.shutdown()
    print(json.dumps(result), flush=True)


def nap(llm, job, level):
    """Sleep, look at the memory, wake, and say the first phase again."""
    from vllm import SamplingParams

    llm.sleep(level=level)
    asleep = tenants()
    hits = counter(llm, "vllm:prefix_cache_hits")
    llm.wake_up()
    count, length = job["phases"][0]
    greedy = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    outs = llm.generate(prompts_of(0, count), greedy, use_tqdm=False)
    return {"asleep": asleep, "tokens": [list(out.outputs[0].token_ids) for out in outs],
            "hits": counter(llm, "vllm:prefix_cache_hits") - hits}  # fmt: skip


def counter(llm, name):
    return sum(int(m.value) for m in llm.get_metrics() if m.name == name)


if __name__ == "__main__":
    main()
