//! What the server's own seccomp filter and Landlock refuse, tried from inside. `isolation` tests podman's filter.

use serde_json::json;

use super::assert_prints;
use crate::harness::{Endpoint, code, eventually, marked_seconds};
use crate::shared::Shared;

on_each_engine! {
    filter_allows_only_unix_sockets
    x32_and_32_bit_system_calls_are_refused
    host_wide_kernel_resources_are_refused
    clone_cannot_create_namespaces
    uncharged_memory_and_shared_state_are_refused
    ptrace_stop_is_not_mistaken_for_exit
    tracer_cannot_delay_the_end_of_a_stage
    number_of_clone_files_processes_is_limited
    core_limit_cannot_be_changed_to_start_the_dump_handler
}

fn filter_allows_only_unix_sockets(engine: &str) {
    let families = "
        import errno, socket
        for call in socket.socket, socket.socketpair:
            for family in range(64):
                for kind in range(1, 11):
                    try:
                        call(family, kind)
                        why = None
                    except OSError as error:
                        why = error.errno
                    if family != socket.AF_UNIX and why != errno.EAFNOSUPPORT:
                        print(call, family, kind, why)
        one, other = socket.socketpair()
        one.send(b'local')
        print(other.recv(9))
        import asyncio, multiprocessing
        async def hello():
            process = await asyncio.create_subprocess_exec('echo', 'asyncio', stdout=-1)
            print((await process.communicate())[0])
        asyncio.run(hello())
        pipe, child = multiprocessing.Pipe()
        multiprocessing.Process(target=child.send, args=('multiprocessing',)).start()
        print(pipe.recv())
    ";
    let printed = "b'local'\nb'asyncio\\n'\nmultiprocessing\n";
    assert_prints(engine, "python", families, printed);
}

fn x32_and_32_bit_system_calls_are_refused(engine: &str) {
    // The same calls by their x32 numbers, and through the 32-bit interface `int 0x80`.
    let other = r#"
        #include <errno.h>
        #include <stdio.h>
        #include <signal.h>
        #include <string.h>
        #include <sys/wait.h>
        #include <unistd.h>
        int main(void) {
        #ifdef __x86_64__
            long calls[] = {41, 53, 56, 272, 308, 248, 249, 250, 321, 298, 323, 425, 426, 427, 206, 253, 294, 435};
            for (int n = 0; n < sizeof calls / sizeof *calls; n++) {
                errno = 0;
                long result = syscall(0x40000000 | calls[n], 0x10000000 | 2, 1, 0, 0, 0, 0);
                if (result != -1 || (errno != ENOSYS && errno != EPERM && errno != EAFNOSUPPORT))
                    printf("%ld: %ld %s\n", calls[n], result, strerror(errno));
            }
            int status;
            if (fork() == 0) {
                int result;
                __asm__ volatile("int $0x80" : "=a"(result) : "a"(20) : "memory");
                _exit(result == -ENOSYS ? 0 : 1);
            }
            wait(&status);
            // A kernel without 32-bit calls sends SIGSEGV. SIGSYS would be the filter, with an audit record on the host.
            int sent = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
            puts(status == 0 || sent == SIGSEGV ? "refused" : sent == SIGSYS ? "killed" : "not refused");
        #else
            puts("refused");
        #endif
            return 0;
        }
    "#;
    assert_prints(engine, "c", other, "refused\n");
}

fn host_wide_kernel_resources_are_refused(engine: &str) {
    let calls = "
        import ctypes, errno, os, platform
        libc = ctypes.CDLL(None, use_errno=True)
        x86 = platform.machine() == 'x86_64'
        def refused(name, x86_number, number, *args, why=errno.ENOSYS):
            ctypes.set_errno(0)
            result = libc.syscall(ctypes.c_long(x86_number if x86 else number), *map(ctypes.c_long, args))
            if result != -1 or ctypes.get_errno() != why:
                print(name, result, ctypes.get_errno())
        context = ctypes.c_ulong(0)
        refused('io_setup', 206, 0, 60000, ctypes.addressof(context))
        refused('inotify_init1', 294, 26, 0)
        refused('fanotify_init', 300, 262, 0, 0)
        refused('io_uring_enter', 426, 426, 0, 0, 0, 0, 0)
        refused('io_uring_register', 427, 427, 0, 0, 0, 0)
        if x86: refused('inotify_init', 253, 0)
        refused('fcntl of F_NOTIFY', 72, 25, os.open('/', os.O_RDONLY), 1026, 1, why=errno.EINVAL)
        try:
            print('a terminal', os.open('/dev/ptmx', os.O_RDWR))
        except OSError as error:
            print(error.strerror)
    ";
    assert_prints(engine, "python", calls, "Permission denied\n");
}

fn clone_cannot_create_namespaces(engine: &str) {
    let clones = r#"
        #include <errno.h>
        #include <signal.h>
        #include <stdio.h>
        #include <string.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        int main(void) {
            /* cgroup, uts, ipc, user, pid, net, mount */
            unsigned flags[] = {0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x00020000};
            for (int n = 0; n < 7; n++) {
                errno = 0;
                long result = syscall(SYS_clone, (unsigned long)flags[n] | SIGCHLD, 0, 0, 0, 0);
                if (result == 0) _exit(0);
                if (result != -1 || errno != ENOSYS) printf("%x: %ld %s\n", flags[n], result, strerror(errno));
                /* The kernel ignores the upper half of the flags; it must not confuse the filter. */
                result = syscall(SYS_clone, 0x100000000ul | flags[n] | SIGCHLD, 0, 0, 0, 0);
                if (result == 0) _exit(0);
                if (result != -1 || errno != ENOSYS) printf("%x: %ld %s\n", flags[n], result, strerror(errno));
            }
            unsigned long args[11] = {0x10000000, 0, 0, 0, SIGCHLD};
            errno = 0;
            long result = syscall(435, args, sizeof args);
            if (result != -1 || errno != ENOSYS) printf("clone3: %ld %s\n", result, strerror(errno));
            puts("end");
            return 0;
        }
    "#;
    assert_prints(engine, "c", clones, "end\n");
}

/// Calls that use memory outside of any cgroup, cause work on the host, or change state that containers share.
fn uncharged_memory_and_shared_state_are_refused(engine: &str) {
    let calls = r#"
        import ctypes, errno, fcntl, os, socket, struct
        libc = ctypes.CDLL(None, use_errno=True)
        def tried(name, call):
            try:
                call()
                print(name, 'done')
            except OSError as error:
                print(name, errno.errorcode[error.errno])
        def c(function, *args):
            def call():
                ctypes.set_errno(0)
                result = function(*args)
                if result in (-1, 2 ** 64 - 1) or result > 0 and function is libc.posix_fadvise:
                    raise OSError(ctypes.get_errno() or result, '')
            return call
        libc.mmap.restype = ctypes.c_ulong
        os.mkdir('/tmp/d')
        acl = struct.pack('<I', 2) + b''.join(struct.pack('<HHI', tag, 7, who) for tag, who in
            [(1, 2 ** 32 - 1), (2, 1), (4, 2 ** 32 - 1), (16, 2 ** 32 - 1), (32, 2 ** 32 - 1)])
        tried('default ACL', lambda: os.setxattr('/tmp/d', 'system.posix_acl_default', acl))
        tried('attribute', lambda: os.setxattr('/tmp/d', 'user.x', b'x'))
        local = socket.socketpair()[0]
        for name, request in ('SIOCGIFBR', 0x8940), ('SIOCGIFVLAN', 0x8982), ('SIOCGIFNAME', 0x8910):
            tried(name, lambda: fcntl.ioctl(local, request, bytes(64)))
        program = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0))
        fprog = struct.pack('HxxxxxxP', 1, ctypes.addressof(program))
        tried('SO_ATTACH_FILTER', lambda: local.setsockopt(socket.SOL_SOCKET, 26, fprog))
        tried('PR_SET_SECCOMP', c(libc.prctl, 22, 2, ctypes.c_char_p(fprog)))
        tried('PR_SET_VMA', c(libc.prctl, 0x53564d41, 0, 0, 0, 0))
        tried('MAP_HUGETLB', c(libc.mmap, None, 2 << 20, 3, 0x40022, -1, 0))
        tried('MFD_HUGETLB', c(libc.memfd_create, b'x', 4))
        tried('O_DIRECT', lambda: os.open('/usr/bin/python3', os.O_RDONLY | os.O_DIRECT))
        tried('F_SETFL of O_DIRECT', lambda: fcntl.fcntl(os.pipe()[0], fcntl.F_SETFL, os.O_DIRECT))
        # On an invalid descriptor they would fail if they reached the kernel.
        for name in 'fsync', 'fdatasync', 'syncfs':
            tried(name, c(getattr(libc, name), 999))
        tried('posix_fadvise', c(libc.posix_fadvise, 999, 0, 0, 4))
        tried('readahead', c(libc.readahead, 999, 0, 4096))
        def write(path):
            with open(path, 'w') as file: file.write('0')
        tried('utime of a device', lambda: os.utime('/dev/null'))
        tried('oom_score_adj', lambda: write('/proc/self/oom_score_adj'))
        tried('comm', lambda: write('/proc/self/comm'))
        print(open('/proc/self/oom_score_adj').read().strip())
        write('/dev/null'); write('/work/own'); write('/tmp/own'); write('/dev/shm/own')
        os.truncate('/work/own', 0); os.rename('/work/own', '/work/other'); os.utime('/work/other')
    "#;
    let printed = "\
        default ACL ENOTSUP\nattribute ENOTSUP\nSIOCGIFBR ENOTTY\nSIOCGIFVLAN ENOTTY\nSIOCGIFNAME ENOTTY\n\
        SO_ATTACH_FILTER ENOPROTOOPT\nPR_SET_SECCOMP EINVAL\nPR_SET_VMA EINVAL\nMAP_HUGETLB ENOMEM\nMFD_HUGETLB EINVAL\n\
        O_DIRECT EINVAL\nF_SETFL of O_DIRECT EINVAL\nfsync done\nfdatasync done\nsyncfs done\nposix_fadvise done\n\
        readahead done\nutime of a device EROFS\noom_score_adj EACCES\ncomm EACCES\n1000\n";
    assert_prints(engine, "python", calls, printed);
}

/// Runs a C program and returns its exit code and verdict.
fn run_c(server: &Endpoint, program: &str) -> (i64, String) {
    let body = json!({"language": "c", "files": [{"content": code(program)}]});
    let reply =
        server.request("POST", "/api/v2/execute", &[("Content-Type", "application/json")], body.to_string().as_bytes());
    let answer = reply.json();
    (answer["run"]["code"].as_i64().unwrap_or(-1), answer["verdict"].as_str().unwrap_or("none").to_owned())
}

fn ptrace_stop_is_not_mistaken_for_exit(engine: &str) {
    let server = Shared::patient(engine, "c");
    let traced = r#"
        #include <signal.h>
        #include <sys/ptrace.h>
        #include <unistd.h>
        int main(void) {
            ptrace(PTRACE_TRACEME, 0, 0, 0);
            raise(SIGCHLD);
            raise(SIGURG);
            usleep(100000);
            return 7;
        }
    "#;
    assert_eq!(run_c(&server, traced), (7, "runtime_error".to_owned()));
}

fn tracer_cannot_delay_the_end_of_a_stage(engine: &str) {
    let server = Shared::patient(engine, "c");
    let mark = marked_seconds(0);
    // The child traces its parent and never waits for it, so the exit of the parent is not reported to init.
    let held = r#"
        #include <signal.h>
        #include <sys/prctl.h>
        #include <sys/ptrace.h>
        #include <unistd.h>
        #define MARK "SECONDS"
        int main(void) {
            int ready[2];
            char byte;
            pipe(ready);
            prctl(0x59616d61, -1ul, 0, 0, 0);
            if (fork() == 0) {
                ptrace(0x4206, getppid(), 0, 0); /* PTRACE_SEIZE */
                write(ready[1], "x", 1);
                for (;;) pause();
            }
            read(ready[0], &byte, 1);
            return 3;
        }
    "#;
    let outcome = eventually("an answer", || Some(run_c(&server, &held.replace("SECONDS", &mark))));
    assert_eq!(outcome, (3, "runtime_error".to_owned()));
}

/// /proc lists a lock under the process that took it, and not at all once that process is dead, even if another process
/// shares its descriptors. Init therefore allows only a few processes that share descriptors.
fn number_of_clone_files_processes_is_limited(engine: &str) {
    let hidden = r#"
        #include <errno.h>
        #include <fcntl.h>
        #include <sched.h>
        #include <signal.h>
        #include <stdio.h>
        #include <string.h>
        #include <sys/syscall.h>
        #include <sys/wait.h>
        #include <unistd.h>
        int main(void) {
            int file = open("/tmp/f", O_RDWR | O_CREAT, 0600), made = 0, seen = 0;
            for (; made < 100; made++) {
                long child = syscall(SYS_clone, 0x400 | SIGCHLD, 0, 0, 0, 0);
                if (child < 0) break;
                if (child == 0) {
                    struct flock lock = {.l_type = F_RDLCK, .l_start = made * 2, .l_len = 1};
                    _exit(fcntl(file, F_SETLK, &lock) != 0);
                }
                waitpid(child, NULL, 0);
            }
            printf("%d %s\n", made, strerror(errno));
            return 0;
        }
    "#;
    assert_prints(engine, "c", hidden, "8 Function not implemented\n");
}

fn core_limit_cannot_be_changed_to_start_the_dump_handler(engine: &str) {
    let lowered = "
        import resource
        for limit in (0, 0), (0, 1), (1, 1):
            resource.setrlimit(resource.RLIMIT_CORE, limit)
        resource.prlimit(0, resource.RLIMIT_CORE, (0, 0))
        print(resource.getrlimit(resource.RLIMIT_CORE), resource.prlimit(0, resource.RLIMIT_CORE))
        resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10))
        print(resource.getrlimit(resource.RLIMIT_NOFILE))
    ";
    assert_prints(engine, "python", lowered, "(1, 1) (1, 1)\n(10, 10)\n");
}
