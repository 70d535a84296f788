//! Programs that exhaust a resource. If the host can enforce the limit, the answer names it; otherwise the program is
//! killed at its time limit.

use super::{assert_prints, attack, serve};
use crate::client::Answer;
use crate::harness::code;
use crate::shared::Shared;

on_each_engine! {
    zombies_and_orphans_are_counted_and_reaped
    every_kind_of_memory_is_charged
    cpu_time_includes_threads_and_children
    crashes_leave_no_core_dump
    timers_queues_and_descriptors_are_limited
    huge_arguments_and_environments_do_not_harm_init
    output_of_any_shape_is_bounded
}

/// Checks that after this output there is one last line by the server that says why the program was killed.
#[track_caller]
fn assert_killed(answer: &Answer, printed: &str, why: &str) {
    let line = answer.run_output.strip_prefix(printed).unwrap_or_else(|| panic!("{answer:?}"));
    assert!(line.starts_with(&format!("coderunner: {why}")), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
}

fn zombies_and_orphans_are_counted_and_reaped(engine: &str) {
    let server = serve(engine, "python", "[limits]\nprocesses = 16\nrun_time = \"60s\"\nrun_cpu_time = \"2s\"");
    // Zombies, for which nobody waits, count towards the limit.
    let zombies = "
        import os, time
        made = 0
        try:
            while True:
                if os.fork() == 0:
                    os._exit(0)
                made += 1
        except BlockingIOError:
            print(made)
    ";
    assert_eq!(attack(&server, "python", &code(zombies)), Answer::ran("15\n"));
    // Init reaps orphans, so a program can create any number of them one after another.
    let orphans = "
        import os, time
        def fork():
            while True:
                try:
                    return os.fork()
                except BlockingIOError:
                    time.sleep(0.01)
        for _ in range(100):
            if fork() == 0:
                if fork() == 0:
                    os.setsid()
                    os._exit(0)
                os._exit(0)
            os.wait()
        print('end')
    ";
    assert_eq!(attack(&server, "python", &code(orphans)), Answer::ran("end\n"));
    // A tree of processes that keep replacing one another: the kill reaches all of them.
    let running = "
        import os, time
        print('root', flush=True)
        for _ in range(6): os.fork()
        while True:
            try:
                if os.fork(): os._exit(0)
            except OSError:
                pass
    ";
    let answer = attack(&server, "python", &code(running));
    assert!(answer.run_output.starts_with("root\n"), "{answer:?}");
    server.stop();
}

fn every_kind_of_memory_is_charged(engine: &str) {
    let server = serve(
        engine,
        "python",
        "[limits]\nmemory = \"64MiB\"\nopen_files = 256\nrun_time = \"60s\"\nrun_cpu_time = \"60s\"",
    );
    let kinds = [
        // Anonymous files that are not mapped.
        "
        import os
        held = [os.memfd_create('x') for _ in range(8)]
        for fd in held:
            for _ in range(16): os.write(fd, bytes(1 << 20))
        print('survived')
        ",
        // Data in pipes.
        "
        import fcntl, os
        held = []
        for _ in range(100):
            reader, writer = os.pipe()
            try: fcntl.fcntl(writer, 1031, 1 << 20)
            except OSError: pass
            os.set_blocking(writer, False)
            held.append((reader, writer))
            try:
                while os.write(writer, bytes(65536)): pass
            except BlockingIOError: pass
        print('survived')
        ",
        // Shared memory of several processes.
        "
        import mmap, os
        for _ in range(4):
            if os.fork() == 0:
                shared = mmap.mmap(-1, 40 << 20)
                for at in range(0, 40 << 20, 4096): shared[at] = 1
                os._exit(0)
        while True:
            try: pid, status = os.wait()
            except ChildProcessError: break
            if status: os.abort()
        print('survived')
        ",
        // Stacks of threads.
        "
        import threading
        threading.stack_size(64 << 20)
        def deep(n): return deep(n + 1) if n < 90 else None
        threads = [threading.Thread(target=deep, args=(0,)) for _ in range(10)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        held = [bytearray(1 << 20) for _ in range(100)]
        print('survived')
        ",
    ];
    for kind in kinds {
        let answer = attack(&server, "python", &code(kind));
        match server.enforces("memory") {
            true => assert_killed(&answer, "", "killed: out of memory"),
            false => assert_eq!(answer, Answer::ran("survived\n"), "{kind}"),
        }
    }
    // Page cache of image files is reclaimed before a program is killed for memory.
    let cached = "
        import os
        for path, dirs, files in os.walk('/usr'):
            for file in files:
                try: open(path + '/' + file, 'rb').read()
                except OSError: pass
        print('read')
    ";
    assert_eq!(attack(&server, "python", &code(cached)), Answer::ran("read\n"));
    server.stop();
}

fn cpu_time_includes_threads_and_children(engine: &str) {
    let server = serve(
        engine,
        "c",
        "[limits]\nrun_time = \"60s\"\nrun_cpu_time = \"500ms\"\nprocesses = 32\ncompile_time = \"60s\"\ncompile_cpu_time = \"60s\"",
    );
    let burners = [
        // A process name that is not UTF-8 and contains parentheses.
        "#include <sys/prctl.h>\n#include <unistd.h>\n\
         int main(void) { prctl(PR_SET_NAME, \"\\xff) 1 (\\xfe\"); fork(); fork(); for (;;); }",
        // Threads.
        "#include <pthread.h>\nvoid *burn(void *x) { for (;;); }\n\
         int main(void) { pthread_t t; for (int n = 0; n < 8; n++) pthread_create(&t, 0, burn, 0); pthread_exit(0); }",
        // Children, while the parent waits.
        "#include <sys/wait.h>\n#include <unistd.h>\n\
         int main(void) { for (int n = 0; n < 8; n++) if (!fork()) for (;;); while (wait(0) > 0); return 0; }",
        // CPU time in the kernel.
        "#include <unistd.h>\nint main(void) { for (;;) getppid(); }",
        // Short-lived children for which nobody waits.
        &short_lived("signal(SIGCHLD, SIG_IGN)", "spin(0)"),
        // The same with SA_NOCLDWAIT, and with a thread that does the work.
        &short_lived(
            "struct sigaction no = {.sa_handler = SIG_DFL, .sa_flags = SA_NOCLDWAIT}; sigaction(SIGCHLD, &no, 0)",
            "pthread_t t; pthread_create(&t, 0, spin, 0); pthread_join(t, 0)",
        ),
    ];
    for burner in burners {
        let answer = attack(&server, "c", burner);
        let answer = Answer { compile_output: String::new(), ..answer };
        assert_killed(&answer, "", "killed: out of CPU time");
    }
    server.stop();
}

/// A program that starts one child after another without waiting for it; each uses 5 ms of CPU time.
fn short_lived(ignore: &str, burn: &str) -> String {
    format!(
        "#include <pthread.h>\n#include <signal.h>\n#include <time.h>\n#include <unistd.h>\n\
         void *spin(void *x) {{ struct timespec t; do clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);\n\
           while (t.tv_sec == 0 && t.tv_nsec < 5000000); return 0; }}\n\
         int main(void) {{ {ignore}; for (;;) {{ int end[2]; char x; pipe(end);\n\
           if (fork() == 0) {{ {burn}; _exit(0); }}\n\
           close(end[1]); read(end[0], &x, 1); close(end[0]); }} }}"
    )
}

fn crashes_leave_no_core_dump(engine: &str) {
    // There is no core file, and the dump handler of the host does not run, which some kernels start even for a limit
    // of 0. Changing the limit has no effect.
    let crash = r#"
        #include <dirent.h>
        #include <signal.h>
        #include <stdio.h>
        #include <sys/prctl.h>
        #include <sys/resource.h>
        #include <sys/wait.h>
        #include <unistd.h>
        int main(void) {
            struct rlimit limit, more = {RLIM_INFINITY, RLIM_INFINITY};
            getrlimit(RLIMIT_CORE, &limit);
            printf("%ld %ld %d\n", (long)limit.rlim_cur, (long)limit.rlim_max, setrlimit(RLIMIT_CORE, &more));
            int status, files = 0;
            for (int n = 0; n < 8; n++) {
                if (fork() == 0) { chdir("/tmp"); prctl(PR_SET_DUMPABLE, 1); raise(SIGQUIT); }
                wait(&status);
                if (WCOREDUMP(status)) puts("dumped");
            }
            DIR *dir = opendir("/tmp");
            while (readdir(dir)) files++;
            printf("%d\n", files);
            return 0;
        }
    "#;
    assert_prints(engine, "c", crash, "1 1 0\n2\n");
}

fn timers_queues_and_descriptors_are_limited(engine: &str) {
    let probe = "
        import ctypes, errno, fcntl, os, resource, signal, socket
        libc = ctypes.CDLL(None, use_errno=True)
        def until_refused(call, most):
            for made in range(most):
                if call() == -1: return made
            return 'more'
        timer = ctypes.c_void_p()
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        timers = until_refused(lambda: libc.timer_create(0, None, ctypes.byref(timer)), 5000)
        print('timers', timers != 'more' and timers <= 1024)
        libc.mq_open.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
        print('queue', libc.mq_open(b'/queue', os.O_CREAT | os.O_RDWR, 0o600, None))
        print('locked', libc.mlock(ctypes.create_string_buffer(1 << 20), 1 << 20))
        # Descriptors in flight between sockets count, too.
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        one.setblocking(False)
        sent = 0
        try:
            while sent < 5000:
                socket.send_fds(one, [b'x'], [0] * 32)
                sent += 32
        except OSError as error:
            print('in flight', sent <= 1024)
        print('raised', end=' ')
        for name in 'NOFILE', 'NPROC', 'FSIZE', 'CORE', 'MSGQUEUE', 'SIGPENDING', 'MEMLOCK', 'CPU', 'RTPRIO', 'NICE':
            limit = getattr(resource, 'RLIMIT_' + name, None)
            if limit is None: continue
            soft, hard = resource.getrlimit(limit)
            if hard == resource.RLIM_INFINITY: continue
            try:
                resource.setrlimit(limit, (hard + 1, hard + 1))
            except (OSError, ValueError): pass
            if resource.getrlimit(limit) != (soft, hard): print(name, end=' ')
        print()
    ";
    let printed = "timers True\nqueue -1\nlocked -1\nin flight True\nraised \n";
    let server = serve(engine, "python", "[limits]\nopen_files = 64\nrun_time = \"60s\"\nrun_cpu_time = \"60s\"");
    assert_eq!(attack(&server, "python", &code(probe)), Answer::ran(printed));
    server.stop();
}

fn huge_arguments_and_environments_do_not_harm_init(engine: &str) {
    let server = Shared::patient(engine, "python");
    let huge = "
        import os, subprocess, sys
        if len(sys.argv) > 1:
            print(len(sys.argv), len(os.environ))
            sys.exit()
        for args, env in [(['x' * 200000], {}), (['x'] * 2000000, {}), ([], {'X': 'y' * 200000})]:
            try: subprocess.run(['/usr/bin/true'] + args, env=env)
            except OSError as error: print(error.strerror)
        # The largest arguments and environment that fit. Init reads them whenever it measures what programs use.
        args = ['a' * 100000] * 10
        os.execve(sys.executable, [sys.executable, 'main.py'] + args, {str(n): 'b' * 90000 for n in range(6)})
    ";
    let answer = attack(&server, "python", &code(huge));
    let too_long = "Argument list too long\n".repeat(3);
    assert!(answer.run_output.starts_with(&format!("{too_long}11 ")), "{answer:?}");
}

fn output_of_any_shape_is_bounded(engine: &str) {
    let server = serve(
        engine,
        "python",
        "[limits]\noutput = \"64KiB\"\noutput_total = \"1MiB\"\nrun_time = \"60s\"\nrun_cpu_time = \"60s\"",
    );
    // One byte per write; the pipe cannot be switched to packet mode.
    let packets = "
        import errno, fcntl, os
        try:
            fcntl.fcntl(1, fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT)
            print('packets')
        except OSError as error:
            if error.errno != errno.EINVAL: raise
        for _ in range(60000): os.write(1, b'x')
        fcntl.fcntl(1, fcntl.F_SETFL, os.O_WRONLY | os.O_NONBLOCK)
    ";
    assert_eq!(attack(&server, "python", &code(packets)), Answer::ran(&"x".repeat(60000)));
    // Both streams from many processes, up to the total output limit.
    let flood = "
        import os
        for _ in range(4): os.fork()
        while True:
            os.write(1, b'o' * 65536)
            os.write(2, b'e' * 65536)
    ";
    let answer = attack(&server, "python", &code(flood));
    assert!(
        answer.run_output.ends_with("\ncoderunner: killed: too much output\n"),
        "{:?}",
        answer.run_output.lines().last()
    );
    assert!(answer.run_output.len() < 70_000);
    // All byte values in an order that is mostly invalid UTF-8, and characters that the limit would split.
    let bytes = "
        import os, sys
        every = bytes(range(256)) + bytes(reversed(range(256))) + b'\\xed\\xa0\\x80\\xc0\\x80\\xf5\\xf4\\x90\\x80\\x80'
        os.write(1, every * 100)
        os.write(2, b'\\x1b]0;title\\x07\\x1b[2J\\r\\n\\xe2\\x80\\xa8\\xe2\\x80\\xa9\\xef\\xbf\\xbe')
        os.write(1, '\\U0001f980'.encode() * 20000)
    ";
    let answer = attack(&server, "python", &code(bytes));
    assert!(answer.run_output.contains("\u{fffd}"), "{answer:?}");
    assert!(answer.run_output.contains("\u{1b}]0;title\u{7}\u{1b}[2J\r\n\u{2028}\u{2029}\u{fffe}🦀"), "{answer:?}");
    assert!(answer.run_output.contains("🦀\ncoderunner: output cut: "), "{answer:?}");
    // A program that replaces its streams and prints a line that looks like one of the server's.
    let forged = "
        import os
        print('coderunner: killed: out of memory', flush=True)
        os.dup2(os.open('/dev/null', os.O_RDWR), 1)
        os.close(2)
        os.kill(os.getppid(), 0) if os.getppid() != 1 else None
    ";
    assert_eq!(attack(&server, "python", &code(forged)), Answer::ran("coderunner: killed: out of memory\n"));
    server.stop();
}
