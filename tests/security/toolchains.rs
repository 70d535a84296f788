//! The allow-list of system calls has to support common compilers and runtimes: sanitizers, threads, processes and
//! event loops. `packaging/images/build toolchains` builds their image.

use serde_json::json;

use crate::harness::{Options, Server, code};

on_each_engine! {
    compilers_and_runtimes_have_the_system_calls_they_need
}

const CONFIG: &str = r#"
    [limits]
    memory = "512MiB"
    processes = 256
    open_files = 1024
    compile_time = "60s"
    compile_cpu_time = "60s"
    run_time = "60s"
    run_cpu_time = "60s"
    disk = "128MiB"
    [ceilings]
    compile_time = "60s"
    [language.cpp]
    image = "localhost/coderunner-toolchains:latest"
    compile = ["g++", "-fsanitize=address,undefined", "-pthread", "-o", "out", "main.cpp"]
    [language.javascript]
    image = "localhost/coderunner-toolchains:latest"
    [language.java]
    image = "localhost/coderunner-toolchains:latest"
    source = "Main.java"
    compile = ["/usr/lib/jvm/default-java/bin/javac", "Main.java"]
    run = ["/usr/lib/jvm/default-java/bin/java", "Main"]
    health = { code = "class Main { public static void main(String[] a) { System.out.println(1); } }", output = "1\n" }
    [language.go]
    image = "localhost/coderunner-toolchains:latest"
    [language.rust]
    image = "localhost/coderunner-toolchains:latest"
    [language.python-threads]
    image = "localhost/coderunner-python:latest"
    source = "main.py"
    run = ["python3", "main.py"]
    health = { code = "print(1)", output = "1\n" }
"#;

/// Language, program, its exact stdout, and a part of its stderr.
const PROGRAMS: [(&str, &str, &str, &str); 8] = [
    (
        "cpp",
        r#"
            #include <cstdio>
            #include <future>
            #include <thread>
            int main() {
                auto sum = std::async(std::launch::async, [] { int s = 0; for (int i = 0; i < 10; i++) s += i; return s; });
                std::thread([] { std::puts("thread"); }).join();
                std::printf("%d\n", sum.get());
            }
        "#,
        "thread\n45\n",
        "",
    ),
    ("cpp", "int main(int n, char **) { int *p = new int[2]; delete[] p; return p[n]; }", "", "heap-use-after-free"),
    ("cpp", "#include <cstdlib>\nint main() { void *volatile p = malloc(9); p = nullptr; }", "", "LeakSanitizer"),
    (
        "python-threads",
        "
            import asyncio, multiprocessing, subprocess, threading
            from concurrent.futures import ProcessPoolExecutor
            def square(n): return n * n
            async def shout():
                process = await asyncio.create_subprocess_exec('echo', 'asyncio', stdout=-1)
                return (await process.communicate())[0].decode().strip()
            if __name__ == '__main__':
                found = []
                threads = [threading.Thread(target=found.append, args=(n,)) for n in range(4)]
                [t.start() for t in threads]; [t.join() for t in threads]
                print(sorted(found))
                with multiprocessing.Pool(2) as pool: print(pool.map(square, range(4)))
                with ProcessPoolExecutor(2) as pool: print(list(pool.map(square, range(3))))
                print(asyncio.run(shout()), subprocess.check_output(['wc', '-c'], input=b'123').strip().decode())
        ",
        "[0, 1, 2, 3]\n[0, 1, 4, 9]\n[0, 1, 4]\nasyncio 3\n",
        "",
    ),
    (
        "javascript",
        "
            const { Worker, isMainThread, parentPort } = require('worker_threads');
            const { execFileSync } = require('child_process');
            const fs = require('fs');
            if (isMainThread) {
                new Worker(__filename).on('message', text => {
                    fs.writeFileSync('/tmp/x', text);
                    console.log(fs.readFileSync('/tmp/x', 'utf8'), execFileSync('echo', ['child']).toString().trim());
                });
            } else parentPort.postMessage('worker');
        ",
        "worker child\n",
        "",
    ),
    (
        "java",
        "
            import java.util.stream.*;
            public class Main {
                public static void main(String[] args) throws Exception {
                    System.out.println(IntStream.range(0, 1000).parallel().sum());
                    Process child = new ProcessBuilder(\"echo\", \"child\").inheritIO().start();
                    System.exit(child.waitFor());
                }
            }
        ",
        "499500\nchild\n",
        "",
    ),
    (
        "go",
        "
            package main
            import (\"fmt\"; \"os/exec\"; \"time\")
            func main() {
                numbers := make(chan int)
                for i := 0; i < 4; i++ { go func(n int) { time.Sleep(time.Millisecond); numbers <- n }(i) }
                sum := 0
                for i := 0; i < 4; i++ { sum += <-numbers }
                out, err := exec.Command(\"echo\", \"child\").Output()
                fmt.Print(sum, \" \", string(out), err, \"\\n\")
            }
        ",
        "6 child\n<nil>\n",
        "",
    ),
    (
        "rust",
        "
            use std::{process::Command, sync::mpsc, thread};
            fn main() {
                let (tell, hear) = mpsc::channel();
                for n in 0..4 { let tell = tell.clone(); thread::spawn(move || tell.send(n).unwrap()); }
                drop(tell);
                let child = Command::new(\"echo\").arg(\"child\").output().unwrap();
                println!(\"{} {}\", hear.iter().sum::<i32>(), String::from_utf8_lossy(&child.stdout).trim());
            }
        ",
        "6 child\n",
        "",
    ),
];

fn compilers_and_runtimes_have_the_system_calls_they_need(engine: &str) {
    let server = Server::start(Options {
        languages: &["cpp", "javascript", "java", "go", "rust", "python-threads"],
        containers: 2,
        config: &format!("engine = \"{engine}\"\nqueue.wait = \"5m\"\n{CONFIG}"),
        ..Options::default()
    });
    for (language, program, printed, said) in PROGRAMS {
        let program = code(program);
        let body = json!({"language": language, "files": [{"content": program}]}).to_string();
        let ready = || {
            let answer =
                server.request("POST", "/api/v2/execute", &[("Content-Type", "application/json")], body.as_bytes());
            // The image is still being checked.
            (answer.status != 503).then(|| answer.json())
        };
        let answer = crate::harness::eventually("an answer", ready);
        assert_eq!(answer["run"]["stdout"], printed, "{language}: {answer:#}");
        let stderr = answer["run"]["stderr"].as_str().unwrap_or_default();
        assert!(stderr.contains(said), "{language}: {answer:#}");
    }
    server.stop();
}
