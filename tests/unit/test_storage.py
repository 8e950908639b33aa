"""The one module that touches the disk: order, short writes, links, clear errors."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket

import pytest

from distckpt import files
from distckpt.errors import StorageError, UnsafeCheckpointError
from distckpt.storage import posix


@pytest.fixture
def calls(monkeypatch):
    """Record the names of the calls that make things durable, in order."""
    log = []

    def record(name):
        real = getattr(os, name)

        def call(*arguments, **keywords):
            log.append(name)
            return real(*arguments, **keywords)

        monkeypatch.setattr(os, name, call)

    for name in ("open", "pwritev", "fsync", "close", "link", "rename", "mkdir"):
        record(name)
    return log


def test_new_file_is_synced_before_it_is_closed(tmp_path, calls):
    """The content is durable before anything can refer to it."""
    posix.write_new_file(str(tmp_path / "f"), b"data")
    assert calls == ["open", "pwritev", "fsync", "close"]


def test_sync_directory_opens_syncs_and_closes(tmp_path, calls):
    """Names become durable by syncing their directory."""
    posix.sync_directory(str(tmp_path))
    assert calls == ["open", "fsync", "close"]


def test_make_directories_syncs_each_parent(tmp_path, calls):
    """A new directory that vanishes in a power cut takes the checkpoints with it."""
    posix.make_directories(str(tmp_path / "a" / "b"))
    assert [call for call in calls if call in ("mkdir", "fsync")] == ["mkdir", "fsync"] * 2


def test_make_directories_that_exist_does_nothing(tmp_path, calls):
    """Claiming again is no work."""
    posix.make_directories(str(tmp_path))
    assert calls == []


def test_make_directory_that_exists_is_refused(tmp_path):
    """A pending directory is never shared."""
    with pytest.raises(StorageError) as caught:
        posix.make_directory(str(tmp_path))
    assert caught.value.errno == errno.EEXIST


def test_new_file_that_exists_is_refused_and_untouched(tmp_path):
    """Nothing is ever overwritten."""
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(StorageError):
        posix.write_new_file(str(path), b"new")
    assert path.read_bytes() == b"old"


def test_new_file_through_a_dangling_link_is_refused(tmp_path):
    """A link cannot lead the writer elsewhere."""
    (tmp_path / "f").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        posix.write_new_file(str(tmp_path / "f"), b"new")
    assert not (tmp_path / "elsewhere").exists()


def test_new_file_in_a_missing_directory_never_makes_it(tmp_path):
    """Where the directory is gone, another manager took over."""
    with pytest.raises(StorageError):
        posix.write_new_file(str(tmp_path / "gone" / "f"), b"x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_short_writes_are_completed(tmp_path, monkeypatch, step):
    """A write that wrote less than asked is continued where it stopped."""
    real_pwrite = os.pwrite

    def short_pwritev(descriptor, buffers, offset):
        return real_pwrite(descriptor, b"".join(buffers)[:step], offset)

    def short_pwrite(descriptor, data, offset):
        return real_pwrite(descriptor, bytes(data)[:step], offset)

    monkeypatch.setattr(os, "pwritev", short_pwritev)
    monkeypatch.setattr(os, "pwrite", short_pwrite)
    buffers = [bytes([i]) * size for i, size in enumerate((5, 1, 700, 0, 33))]
    path = tmp_path / "f"
    with posix.NewFile(str(path)) as file:
        file.write_at(10, buffers)
        file.write_at(0, [b"0123456789"])
        file.finish(749)
    assert path.read_bytes() == b"0123456789" + b"".join(buffers)


def test_write_that_writes_nothing_is_an_error(tmp_path, monkeypatch):
    """No endless loop where the disk takes nothing and says nothing."""
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(StorageError, match="wrote nothing"):
        posix.write_new_file(str(tmp_path / "f"), b"data")


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 3000])
def test_many_buffers_are_written_in_order(tmp_path, count):
    """More buffers than one system call takes."""
    buffers = [i.to_bytes(2, "little") for i in range(count)]
    path = tmp_path / "f"
    with posix.NewFile(str(path)) as file:
        file.write_at(0, buffers)
        file.finish(2 * count)
    assert path.read_bytes() == b"".join(buffers)


def test_large_buffer_is_written_and_read_whole(tmp_path):
    """More bytes than one system call takes."""
    data = os.urandom(2**20) * 33
    path = str(tmp_path / "f")
    with posix.NewFile(path) as file:
        file.write_at(0, [b"x", memoryview(data)])
        file.finish(len(data) + 1)
    with posix.OpenFile(path) as file:
        assert file.read(1, len(data)) == data


def test_finish_with_another_size_than_written_is_an_error(tmp_path):
    """A hole or a lost tail is found before the file counts."""
    with posix.NewFile(str(tmp_path / "f")) as file:
        file.write_at(0, [b"data"])
        with pytest.raises(StorageError, match="wrote 5 bytes, the file has 4"):
            file.finish(5)


@pytest.mark.parametrize("what", ["file", "directory"])
def test_failed_fsync_is_never_tried_again(tmp_path, monkeypatch, what):
    """The kernel has dropped the pages; a second call would report success."""
    tries = []

    def fsync(descriptor):
        tries.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError):
        if what == "file":
            posix.write_new_file(str(tmp_path / "f"), b"data")
        else:
            posix.sync_directory(str(tmp_path))
    assert len(tries) == 1


def _open_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("name", ["fsync", "fstat", "pwritev"])
def test_failed_write_leaves_no_descriptor_open(tmp_path, monkeypatch, name):
    """A disk that fails for hours does not use up the descriptors."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    before = _open_descriptors()
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(StorageError):
        posix.write_new_file(str(tmp_path / "f"), b"data")
    monkeypatch.undo()
    assert _open_descriptors() == before


@pytest.fixture
def odd(tmp_path):
    """Make one of each kind of thing that is no regular file."""
    (tmp_path / "target").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    return tmp_path


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["link", "dangling", "fifo", "directory"])
def test_reading_what_is_no_regular_file_is_unsafe(odd, name):
    """Refused at once: nothing is followed, nothing blocks."""
    with pytest.raises(UnsafeCheckpointError, match=name):
        posix.read_file(str(odd / name), 100)


@pytest.mark.timeout(1200)
def test_reading_a_device_is_unsafe():
    """An endless device is not read."""
    with pytest.raises(UnsafeCheckpointError):
        posix.read_file("/dev/zero", 100)


def test_reading_a_socket_is_refused(tmp_path, monkeypatch):
    """A socket cannot be opened; the error is ours."""
    monkeypatch.chdir(tmp_path)  # socket paths must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(StorageError, match="open socket"):
            posix.read_file("socket", 100)


def test_reading_a_file_larger_than_allowed_is_refused(tmp_path):
    """A huge file in a small file's place does not fill the memory."""
    (tmp_path / "f").write_bytes(b"x" * 101)
    with pytest.raises(StorageError, match="101 bytes, more than 100"):
        posix.read_file(str(tmp_path / "f"), 100)


def test_reading_past_the_end_gives_what_there_is(tmp_path):
    """The caller sees that the file is too short."""
    (tmp_path / "f").write_bytes(b"0123456789")
    with posix.OpenFile(str(tmp_path / "f")) as file:
        assert file.read(7, 10) == b"789"


def test_short_reads_are_completed(tmp_path, monkeypatch):
    """A read that gave less than asked is continued where it stopped."""
    (tmp_path / "f").write_bytes(bytes(range(100)))
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset)
    )
    with posix.OpenFile(str(tmp_path / "f")) as file:
        assert file.read(0, 100) == bytes(range(100))


def test_file_closed_twice_closes_no_other_descriptor(tmp_path, calls):
    """The number may belong to another file by then."""
    (tmp_path / "f").write_bytes(b"")
    file = posix.OpenFile(str(tmp_path / "f"))
    file.close()
    file.close()
    assert calls.count("close") == 1


def test_link_to_a_taken_name_is_refused(tmp_path):
    """This is the compare-and-swap that everything rests on."""
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    with pytest.raises(StorageError) as caught:
        posix.link(str(tmp_path / "a"), str(tmp_path / "b"))
    assert caught.value.errno == errno.EEXIST


def test_link_to_a_taken_dangling_link_is_refused(tmp_path):
    """A link that leads nowhere is a taken name too."""
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").symlink_to(tmp_path / "nothing")
    with pytest.raises(StorageError):
        posix.link(str(tmp_path / "a"), str(tmp_path / "b"))


def test_remove_tree_never_follows_a_link_inside(tmp_path):
    """What a link points to stays."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x")
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "link").symlink_to(outside)
    (tree / "file-link").symlink_to(outside / "precious")
    posix.remove_tree(str(tree))
    assert (tree.exists(), (outside / "precious").exists()) == (False, True)


def test_remove_tree_that_is_a_link_is_refused(tmp_path):
    """A link in an attempt's place is not followed."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_bytes(b"x")
    (tmp_path / "tree").symlink_to(tmp_path / "outside")
    with pytest.raises(StorageError):
        posix.remove_tree(str(tmp_path / "tree"))
    assert (tmp_path / "outside" / "precious").exists()


@pytest.mark.parametrize("remove", [posix.remove_tree, posix.remove_file])
def test_removing_what_is_gone_already_is_no_error(tmp_path, remove):
    """Deletions are repeated after a crash."""
    remove(str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("target", True),
        ("link", True),
        ("dangling", True),
        ("no", False),
        ("target/x", False),
    ],
)
def test_exists_asks_for_the_name_itself(odd, name, there):
    """A dangling link is a taken name; a name below a file is none."""
    assert posix.exists(str(odd / name)) is there


def test_list_directory_is_sorted(tmp_path):
    """The same on every filesystem."""
    for name in "cab":
        (tmp_path / name).touch()
    assert posix.list_directory(str(tmp_path)) == ["a", "b", "c"]


def test_list_directory_that_is_missing_is_empty(tmp_path):
    """A run directory need not exist yet."""
    assert posix.list_directory(str(tmp_path / "no")) == []


def test_list_directory_that_is_a_file_is_an_error(odd):
    """A file in the run directory's place is not "no checkpoint"."""
    with pytest.raises(StorageError):
        posix.list_directory(str(odd / "target"))


def test_free_bytes_counts_what_this_user_may_write(tmp_path):
    """The number comes from the filesystem."""
    assert files.free_bytes(str(tmp_path)) >= 0


def _operations(path):
    other = path + ".other"
    return {
        "mkdir": lambda: posix.make_directory(os.path.join(path, "a", "b")),
        "fsync": lambda: posix.sync_directory(path),
        "open": lambda: posix.read_file(path, 1),
        "list": lambda: posix.list_directory(__file__),
        "link": lambda: posix.link(path, other),
        "rename": lambda: posix.rename(path, other),
        "unlink": lambda: posix.remove_file(os.path.dirname(path)),
        "statvfs": lambda: files.free_bytes(path),
        "lstat": lambda: posix.exists("x" * 5000),
    }


@pytest.mark.parametrize("operation", _operations("x"))
def test_error_names_its_operation(tmp_path, operation):
    """Whoever reads the log knows what failed."""
    with pytest.raises(StorageError) as caught:
        _operations(str(tmp_path / "missing"))[operation]()
    assert caught.value.operation == operation


@pytest.mark.parametrize("operation", _operations("x"))
def test_error_names_operation_and_path_in_its_text(tmp_path, operation):
    """The text alone is enough: between ranks errors travel as text."""
    with pytest.raises(StorageError) as caught:
        _operations(str(tmp_path / "missing"))[operation]()
    assert str(caught.value).startswith(f"{operation} {caught.value.path}: ")


@pytest.mark.parametrize("operation", _operations("x"))
def test_error_carries_the_errno(tmp_path, operation):
    """A handler can tell the reasons apart."""
    with pytest.raises(StorageError) as caught:
        _operations(str(tmp_path / "missing"))[operation]()
    assert isinstance(caught.value.errno, int)


def test_full_disk_is_reported_with_the_space_that_is_left(small_disk):
    """ENOSPC says what, where and how much is free."""
    path = os.path.join(small_disk("size=64k"), "f")
    with pytest.raises(StorageError, match=r"write .*/f: .*\(0 B and \d+ inodes") as e:
        posix.write_new_file(path, bytes(10**6))
    assert e.value.errno == errno.ENOSPC


def test_full_disk_that_is_cleared_is_written_again(small_disk):
    """A failed write leaves nothing behind that cannot be removed."""
    path = os.path.join(small_disk("size=64k"), "f")
    with pytest.raises(StorageError):
        posix.write_new_file(path, bytes(10**6))
    posix.remove_file(path)
    posix.write_new_file(path, bytes(10**4))
    assert os.path.getsize(path) == 10**4


# Written past the page cache, begun early, reserved


def _aligned(content):
    """Put bytes where a direct write can begin, padded; returns a view of them."""
    size = -(-len(content) // posix.DIRECT_BYTES) * posix.DIRECT_BYTES
    memory = mmap.mmap(-1, size)
    memory[: len(content)] = content
    return memoryview(memory)


def _write_direct(path, content):
    with posix.NewFile(str(path), len(content), direct=True) as file:
        file.write_at(0, [_aligned(content)])
        file.finish(len(content))


def test_direct_write_is_cut_to_the_size_of_the_content(tmp_path):
    """What fills the last block up is no part of the file."""
    content = os.urandom(3 * 2**20 + 77)
    _write_direct(tmp_path / "f", content)
    assert (tmp_path / "f").read_bytes() == content


@pytest.mark.parametrize("refuses", ["the flag", "the write"])
def test_filesystem_that_writes_nothing_directly_gets_it_otherwise(
    tmp_path, monkeypatch, refuses
):
    """Some refuse the flag, some take it and refuse the first write."""
    real_write, real_fcntl, refused = os.pwritev, fcntl.fcntl, []

    def set_flags(descriptor, command, *flags):
        if flags and flags[0] & os.O_DIRECT and refuses == "the flag":
            refused.append("flag")
            raise OSError(errno.EINVAL, "no")
        return real_fcntl(descriptor, command, *flags)

    def write(descriptor, *arguments):
        if real_fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append("write")
            raise OSError(errno.EINVAL, "no")
        return real_write(descriptor, *arguments)

    monkeypatch.setattr(fcntl, "fcntl", set_flags)
    monkeypatch.setattr(os, "pwritev", write)
    content = os.urandom(40 * 2**20 + 77)
    _write_direct(tmp_path / "f", content)
    assert (tmp_path / "f").read_bytes() == content
    assert len(refused) == 1


class _Libc:
    """Stands for a filesystem that answers these calls in its own way."""

    def __init__(self, number):
        self._number = number
        self.asked = []

    def __getattr__(self, name):
        if name not in ("fallocate", "sync_file_range"):
            raise AttributeError(name)

        def call(*arguments):
            self.asked.append(name)
            ctypes.set_errno(self._number)
            return -1

        return call


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_filesystem_without_these_calls_is_written_all_the_same(
    tmp_path, monkeypatch, number
):
    """They make things faster or errors earlier, nothing else."""
    monkeypatch.setattr(posix, "_LIBC", libc := _Libc(number))
    content = bytes(40 * 2**20)
    with posix.NewFile(str(tmp_path / "f"), len(content)) as file:
        file.write_at(0, [content])
        file.finish(len(content))
    assert os.path.getsize(tmp_path / "f") == len(content)
    assert libc.asked == ["fallocate", "sync_file_range"]  # not again and again


def test_write_back_that_fails_is_an_error(tmp_path, monkeypatch):
    """The disk has said that it has lost bytes; a later fsync might not say so again."""
    monkeypatch.setattr(posix, "_LIBC", _Libc(errno.EIO))
    with posix.NewFile(str(tmp_path / "f")) as file:
        with pytest.raises(StorageError, match=r"sync_file_range .*/f"):
            file.write_at(0, [bytes(40 * 2**20)])


def test_full_disk_is_found_before_anything_is_written(small_disk):
    """Where the filesystem can set space aside."""
    path = os.path.join(small_disk("size=1m"), "f")
    with pytest.raises(StorageError, match=r"fallocate .*/f: .*2.0 MiB needed") as caught:
        posix.NewFile(path, 2 * 2**20)
    assert caught.value.errno == errno.ENOSPC
    assert os.path.getsize(path) == 0


@pytest.mark.parametrize("fails", [False, True])
def test_large_file_is_synced_now_and_then(tmp_path, monkeypatch, fails):
    """So that no single fsync takes so long that it seems to hang; each is checked."""
    monkeypatch.setattr(posix, "_SYNC_BYTES", 2**20)
    synced = []

    def fdatasync(descriptor):
        synced.append(descriptor)
        if fails:
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with posix.NewFile(str(tmp_path / "f")) as file:
        for index in range(7):
            data = [bytes(2**19)]
            if fails and index == 1:
                with pytest.raises(StorageError, match=r"fsync .*/f: lost"):
                    file.write_at(index * 2**19, data)
                break
            file.write_at(index * 2**19, data)
    assert len(synced) == (1 if fails else 3)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_many_buffers_are_filled_in_order(tmp_path, monkeypatch, step):
    """Also where a read gives less than asked, or the file ends early."""
    content = os.urandom(700)
    (tmp_path / "f").write_bytes(content)
    real = os.pread

    def short(descriptor, buffers, offset):
        data = real(descriptor, min(step, sum(map(len, buffers))), offset)
        left = data
        for buffer in buffers:
            memoryview(buffer).cast("B")[: len(left)] = left[: len(buffer)]
            left = left[len(buffer) :]
            if not left:
                break
        return len(data)

    monkeypatch.setattr(os, "preadv", short)
    sizes = [1, 99, 0, 300, 200, 100]
    buffers = [(ctypes.c_char * size)() for size in sizes]
    with posix.OpenFile(str(tmp_path / "f")) as file:
        assert file.read_vector(0, buffers) == 700
        assert b"".join(map(bytes, buffers)) == content
        assert file.read_vector(650, buffers[:4]) == 50
