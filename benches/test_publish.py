"""Row 5: putting a model where others get it: seconds, and the most memory meanwhile."""

import contextlib
import functools
import threading
import time

import pytest
from children import Child, have_free_pages
from company import lacking, room
from machine import meminfo, status
from peers import BY_NAME, OURS
from peers.files import SafetensorsAssigned, TorchLoadMapped
from rounds import ROUNDS, in_common, shuffled
from shapes import BERT, T5, find, largest

ARMS = ("onecopy", "torch.load", "safetensors + assign", "Ray + zerocopy", "joblib(mmap)", "share_memory_ + spawn")
DOES = {
    "onecopy": "onecopy publish",
    "torch.load": "torch.save",
    "safetensors + assign": "safetensors save_model",
    "Ray + zerocopy": "ray.put(extract_tensors)",
    "joblib(mmap)": "joblib.dump(extract_tensors)",
    "share_memory_ + spawn": "share_memory_",
}
SOURCES = ("plain", "torch.load(mmap)", "safetensors")
#: The run in which memory is watched, every 2 ms: its time does not count.
WATCHED = -1
SHAPES = list(dict.fromkeys([largest(T5, BERT).name, largest(BERT).name]))


def source(kind, shape, folder):
    """The model as its user has it."""
    if kind == "plain":
        return shape.model()
    peer = TorchLoadMapped() if kind == "torch.load(mmap)" else SafetensorsAssigned()
    peer.prepare(shape, folder)
    return peer.attach(shape, folder, None)


def make_files(shape, folder):
    """Plays in a child: what the sources are loaded from."""
    for peer in (TorchLoadMapped(), SafetensorsAssigned()):
        peer.put(shape, shape.model, folder)
    yield None


class Watch:
    """The most memory at once: anonymous of this process, and shared of the machine, beyond what there was before."""

    def __init__(self):
        self.anonymous, self.shared = status("RssAnon"), meminfo("Shmem")
        self.most = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self):
        while not self.ended.wait(0.002):
            self.look()

    def look(self):
        now = status("RssAnon") - self.anonymous + meminfo("Shmem") - self.shared
        self.most = max(self.most, now)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        self.look()


def beyond_the_source(peer):
    """The most that it takes, in models. Who gives its source back meanwhile takes one nevertheless: sources can be files."""
    return max(peer.peak - 1, 1.1)


def publishing(name, kind, shape, files, folder, watched):
    """Plays in a child."""
    peer = BY_NAME[name]
    before = status("RssAnon")
    model = source(kind, shape, files)
    # Everything that is made from here on is the peer's. (What lies in a source's file was there before.)
    peer.begin(shape)
    # What a process that works with the peer has done before: Ray is there.
    yield None
    have_free_pages(int(beyond_the_source(peer) * shape.size))
    with Watch() if watched else contextlib.nullcontext() as watch:
        start = time.perf_counter()
        handed = [model]
        del model
        peer.hand_over(shape, handed.pop, folder)
        seconds = time.perf_counter() - start
    yield seconds, watch.most + watch.anonymous - before if watched else None, status("RssAnon") - before
    peer.close()


@functools.cache
def measured(shape_name, kind):
    """By arm: (seconds, bytes left) by round, the most memory; and why there are none."""
    shape = find(shape_name)
    found = {name: {} for name in ARMS}
    most, cannot = {}, {}
    with room() as files:
        if kind != "plain":
            with Child(make_files, shape, files) as child:
                child()
        for number in range(WATCHED, max(2, ROUNDS // 2) if shape is T5 else ROUNDS):
            for name in shuffled(ARMS, number):
                # A source in a file is there already.
                models = beyond_the_source(BY_NAME[name]) + (kind == "plain")
                if reason := lacking(models * shape.size):
                    cannot[name] = reason
                    continue
                with room() as folder, Child(publishing, name, kind, shape, files, folder, number == WATCHED) as child:
                    child()
                    seconds, peak, left = child()
                if number == WATCHED:
                    most[name] = peak
                else:
                    found[name][number] = seconds, left
    return found, most, cannot


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("shape_name", SHAPES)
@pytest.mark.parametrize("name", ARMS)
def test_publish(name, shape_name, kind, play):
    found, most, cannot = measured(shape_name, kind)
    rounds, ours = in_common(found[name], found[OURS.name])
    play(
        f"publish {shape_name}, {kind}",
        DOES[name],
        [seconds for seconds, _ in rounds] or cannot[name],
        ours=[seconds for seconds, _ in ours],
        size=find(shape_name).size,
        peak=most.get(name),
        left=[left for _, left in rounds],
    )
