"""A worker without a framework: speaks the protocol, and misbehaves as the competitor's name says.

A module of `WorkerProcess`. `hang-in-block` sleeps for ever in its second block,
`die-in-prepare` kills its own process, and so on. Durations are invented: `fast` takes half the time of the others.
"""

import os
import signal
import sys
import time

from bench.measure.workers import WorkerProcess, failure, worker_environment

GOOD = ("matmul", "fast", "loop")
# Its first calls are so slow that one seems to fill a block.
STALLED = "stalled"
BAD = (
    "die-in-prepare",
    "die-in-block",
    "hang-in-prepare",
    "hang-in-block",
    "exit-in-check",
    "garbage-in-check",
    "wrong",
    "wrong-later",
    "out-of-memory",
    "allocate-without-end",
    "refused",
    "hopeless",
    "disturbed",
    "lazy",
    "impossible",
)


class FakeWorker:
    def __init__(self, framework):
        self.framework = framework
        self.names = {}
        self.blocks = {}
        self.sized = set()

    def reply(self, request):
        return getattr(self, request["operation"])(request)

    def hello(self, request):
        catalogue = {
            "framework": self.framework,
            "implementations": (*GOOD, STALLED, *BAD),
            "stock": [],
            "yardsticks": ["dense"],
            "missing": {"stock:absent": "absent is not installed"},
        }
        return {
            "ok": True,
            "catalogue": catalogue,
            "devices": ["cpu"],
            "environment": {self.framework: "0", "device_name": os.environ.get("FAKE_DEVICE", "")},
            "python": "3",
            "default_switches": {},
            "large_pages": False,
            "variables": {},
            "cuda_packages": {},
        }

    def open_cell(self, request):
        self.names, self.blocks, self.sized = {}, {}, set()
        if log := os.environ.get("FAKE_LOG"):
            with open(log, "a") as file:
                file.write(f"{request['cell']['workload']['name']} {request['cell']['direction']}\n")
        digest = os.environ.get(f"FAKE_DIGEST_{self.framework}", "same")
        return {"ok": True, "inputs_digest": digest, "switches": {"pid": os.getpid()}, "free_bytes": 2**40}

    def prepare(self, request):
        name = request["implementation"]
        if name == "die-in-prepare":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "hang-in-prepare":
            time.sleep(3600)
        if name == "allocate-without-end":
            held = []
            while True:
                held.append(bytearray(2**24))
        if name == "out-of-memory":
            return failure("oom", "no memory left")
        if name == "refused":
            return failure("unsupported", "not on this device")
        self.names[request["handle"]] = name
        return {
            "ok": True,
            "call_s": 0.1 if name in ("hopeless", "disturbed") else 0.001,
            "compile_s": None,
            "static_memory_bytes": None,
        }

    def judgement(self, right):
        return {
            "status": "ok" if right else "mismatch",
            "reason": "" if right else "y is wrong",
            "bound_fraction": 0.25 if right else 3.0,
            "observed_precision": "ieee_fp32",
            "tensors": {"y": {"status": "ok", "bound_fraction": 0.25, "max_abs_error": 1e-7}},
        }

    def check(self, request):
        name = self.names[request["handle"]]
        if name == "exit-in-check":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(7)
        if name == "garbage-in-check":
            os.write(self.channel._replies, b"this is no message\n")
        return {"ok": True, "judgement": self.judgement(name != "wrong")}

    def memory(self, request):
        return {"ok": True, "peak_memory_bytes": 4096, "memory_method": "invented"}

    def probe(self, request):
        flops = 1 if self.names[request["handle"]] == "lazy" else 10**9
        doubt = "the program that runs does 1 operation" if flops == 1 else ""
        clocks = {
            "synchronised_latency_s": [0.003, 0.002, 0.002],
            "enqueue_s": 1e-5,
            "kernels": {"product": 1},
            "device_busy_s": None,
            "compile_warm_s": None,
        }
        return {"ok": True, "program_flops": flops, "doubt": doubt, **(clocks if request["budget_s"] > 0 else {})}

    def run_for(self, request):
        assert request["seconds"] > 0
        return {"ok": True, "calls": 4 * request["calls"]}

    def ceilings(self, request):
        return {"ok": True, "ceiling_flops_per_s": 1e12, "ceiling_bytes_per_s": 1e10}

    def warm_up(self, request):
        handle = request["handle"]
        stalls = self.names[handle] == STALLED and handle not in self.sized
        self.sized.add(handle)
        if self.names[handle] == "hopeless":
            return {"ok": True, "calls_per_block": 1, "block_latency_s": [0.1]}
        return {"ok": True, "calls_per_block": 1 if stalls else 10, "block_latency_s": [0.02]}

    def block(self, request):
        handle = request["handle"]
        name = self.names[handle]
        self.blocks[handle] = self.blocks.get(handle, 0) + 1
        if self.blocks[handle] == 2 and name == "die-in-block":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.blocks[handle] == 2 and name == "hang-in-block":
            time.sleep(3600)
        if name == "impossible":
            return {"ok": True, "block_latency_s": 1e-9, "judgement": self.judgement(True)}
        if name == STALLED:
            return {"ok": True, "block_latency_s": 2e-4 * request["calls"], "judgement": self.judgement(True)}
        reply = {"ok": True, "block_latency_s": (0.01 if name == "fast" else 0.02) * (1 + 1e-3 * self.blocks[handle])}
        if request["verify"]:
            reply["judgement"] = self.judgement(name != "wrong-later")
        return reply

    def drop(self, request):
        return {"ok": True}


def main(channel, framework):
    worker = FakeWorker(framework)
    worker.channel = channel
    while (request := channel.receive()) is not None:
        channel.send(worker.reply(request))


def start(framework, kind=WorkerProcess, python=None):
    """Starts a worker that needs no framework."""
    environment = worker_environment(framework, device="cpu", division="matched", cpus=())
    return kind(framework, environment, python=python, module="bench.tests.fake_worker")
