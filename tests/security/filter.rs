//! Each refusal of our own filter, tried from inside. Those of podman's are with the other walls.

use super::prints;

on_each_engine! {
    no_socket_but_a_local_one
    no_call_by_another_number
    nothing_of_the_whole_hosts_can_be_used_up_or_watched
    no_clone_makes_a_namespace
}

fn no_socket_but_a_local_one(engine: &str) {
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
    prints(engine, "python", "", families, printed);
}

fn no_call_by_another_number(engine: &str) {
    // The kernel knows the same calls by other numbers, for programs of 32 bits.
    let other = r#"
        #include <errno.h>
        #include <stdio.h>
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
                printf("getpid of 32 bits: %d\n", result);
                fflush(stdout);
                _exit(0);
            }
            wait(&status);
            puts(WIFSIGNALED(status) ? "killed" : "not killed");
        #else
            puts("killed");
        #endif
            return 0;
        }
    "#;
    prints(engine, "c", "", other, "killed\n");
}

fn nothing_of_the_whole_hosts_can_be_used_up_or_watched(engine: &str) {
    let calls = "
        import ctypes, errno, os, platform
        libc = ctypes.CDLL(None, use_errno=True)
        x86 = platform.machine() == 'x86_64'
        def refused(name, x86_number, number, *args):
            ctypes.set_errno(0)
            result = libc.syscall(ctypes.c_long(x86_number if x86 else number), *map(ctypes.c_long, args))
            if result != -1 or ctypes.get_errno() != errno.ENOSYS:
                print(name, result, ctypes.get_errno())
        context = ctypes.c_ulong(0)
        refused('io_setup', 206, 0, 60000, ctypes.addressof(context))
        refused('inotify_init1', 294, 26, 0)
        refused('fanotify_init', 300, 262, 0, 0)
        refused('sync', 162, 81)
        refused('syncfs', 306, 267, os.open('/', os.O_RDONLY))
        refused('io_uring_enter', 426, 426, 0, 0, 0, 0, 0)
        refused('io_uring_register', 427, 427, 0, 0, 0, 0)
        if x86: refused('inotify_init', 253, 0)
        refused('fcntl of F_NOTIFY', 72, 25, os.open('/', os.O_RDONLY), 1026, 1)
        try:
            print('a terminal', os.open('/dev/ptmx', os.O_RDWR))
        except OSError as error:
            print(error.strerror)
    ";
    prints(engine, "python", "", calls, "Permission denied\n");
}

fn no_clone_makes_a_namespace(engine: &str) {
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
                /* The upper half is no flag, and hides none. */
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
    prints(engine, "c", "", clones, "end\n");
}
