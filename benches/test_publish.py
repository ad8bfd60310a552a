"""Row 5: putting a model where others get it: seconds, and the most memory meanwhile."""

import functools
import threading
import time

import pytest
from children import Child
from company import SPARE, Cannot, room
from machine import available, meminfo, status
from peers import BY_NAME, OURS
from peers.files import SafetensorsAssigned, TorchLoadMapped
from rounds import ROUNDS
from shapes import BERT, T5, largest

ARMS = ("onecopy", "torch.load", "safetensors + assign", "Ray + zerocopy", "joblib(mmap)", "share_memory_ + spawn")
DOES = {
    "onecopy": "onecopy publish",
    "torch.load": "torch.save",
    "safetensors + assign": "safetensors save_file",
    "Ray + zerocopy": "ray.put(extract_tensors)",
    "joblib(mmap)": "joblib.dump(extract_tensors)",
    "share_memory_ + spawn": "share_memory_",
}
SOURCES = ("plain", "torch.load(mmap)", "safetensors")
SHAPES = list(dict.fromkeys([largest(T5, BERT).name, largest(BERT).name]))


def source(kind, shape, folder):
    """The model as its user has it."""
    if kind == "plain":
        return shape.model()
    peer = TorchLoadMapped() if kind == "torch.load(mmap)" else SafetensorsAssigned()
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


def publishing(name, kind, shape, files, folder):
    """Plays in a child."""
    peer = BY_NAME[name]
    # What a process that works with the peer has done before: Ray is there.
    before = Watch()
    model = source(kind, shape, files)
    # Everything that is made from here on is the peer's. (What lies in a source's file was there before.)
    peer.begin(shape)
    yield None
    with Watch() as watch:
        start = time.perf_counter()
        handed = [model]
        del model
        peer.hand_over(shape, handed.pop, folder)
        seconds = time.perf_counter() - start
    yield seconds, watch.most + watch.anonymous - before.anonymous, status("RssAnon") - before.anonymous
    peer.close()


@functools.cache
def measured(shape_name, kind):
    from shapes import find

    shape = find(shape_name)
    found = {name: [] for name in ARMS}
    with room() as files:
        if kind != "plain":
            with Child(make_files, shape, files) as child:
                child()
        for number in range(max(2, ROUNDS // 2) if shape is T5 else ROUNDS):
            for at in range(len(ARMS)):
                name = ARMS[(at + number) % len(ARMS)]
                peer = BY_NAME[name]
                needed, free = peer.peak * shape.size, available() - SPARE
                if needed > free or isinstance(found[name], Cannot):
                    found[name] = Cannot(f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
                    continue
                with room() as folder, Child(publishing, name, kind, shape, files, folder) as child:
                    child()
                    found[name].append(child())
    return found


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("shape_name", SHAPES)
@pytest.mark.parametrize("name", ARMS)
def test_publish(name, shape_name, kind, play):
    from shapes import find

    group = f"publish {shape_name}, {kind}"
    found = measured(shape_name, kind)
    if isinstance(found[name], Cannot):
        play(group, DOES[name], found[name])
    seconds, most, left = zip(*found[name], strict=True)
    ours = [one[0] for one in found[OURS.name]]
    play(group, DOES[name], list(seconds), ours=ours, size=find(shape_name).size, peak=list(most), left=list(left))
