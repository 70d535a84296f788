//! The batch API: a program is compiled once and run on many inputs, each in its own sandbox.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::client::Reply;
use crate::harness::{Endpoint, Options, Server, eventually, marked_seconds, wait_gone, wait_running};
use crate::leftovers::marked;
use crate::shared::Shared;

on_each_engine! {
    batch_compiles_once_and_runs_each_input_in_its_own_sandbox
    build_that_cannot_be_copied_is_compiled_for_each_input
    copied_build_is_indistinguishable_from_a_local_one
}

const JSON: (&str, &str) = ("Content-Type", "application/json");
const LINES: (&str, &str) = ("Accept", "application/x-ndjson");

/// A language whose compiler runs the source as a shell script.
const SCRIPT: &str = r#"
[language.script]
image = "localhost/coderunner-bash:latest"
source = "main.sh"
compile = ["bash", "main.sh"]
artifact = "out"
run = ["./out"]
health = { code = "printf '#!/bin/bash\necho hello' >out; chmod +x out", output = "hello\n" }
"#;

fn serve(engine: &str, languages: &[&str], containers: usize) -> Server {
    let config = match engine {
        "" => SCRIPT.to_owned(),
        engine => format!("engine = {engine:?}\n{SCRIPT}"),
    };
    Server::start(Options { languages, containers, config: &config, ..Options::default() })
}

fn post(server: &Endpoint, headers: &[(&str, &str)], body: &Value) -> Reply {
    server.request("POST", "/api/v2/batch", &[headers, &[JSON]].concat(), body.to_string().as_bytes())
}

fn program(language: &str, code: &str, inputs: Value) -> Value {
    json!({"language": language, "version": "*", "files": [{"content": code}], "inputs": inputs})
}

#[track_caller]
fn assert_ok(reply: &Reply) -> Value {
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    reply.json()
}

/// What the program printed for each input.
fn printed(answer: &Value) -> Vec<&str> {
    let results = answer["results"].as_array().unwrap();
    results.iter().map(|result| result["run"]["stdout"].as_str().unwrap_or_else(|| panic!("{result}"))).collect()
}

fn batch_compiles_once_and_runs_each_input_in_its_own_sandbox(engine: &str) {
    let server = serve(engine, &["script"], 3);
    let code = r#"
        uuid=$(cat /proc/sys/kernel/random/uuid)
        mkdir -p deep/er; echo "$uuid" >deep/er/uuid; ln -s deep/er/uuid link
        printf '#!/bin/bash\ncat link; ls /tmp; echo x >/tmp/mark; cat; echo "$@"' >out; chmod 755 out"#;
    let inputs: Vec<Value> =
        (0..10).map(|n| json!({"stdin": format!("{n}\n"), "args": ["a b", n.to_string()]})).collect();
    let answer = assert_ok(&post(&server, &[], &program("script", code, json!(inputs))));
    let printed = printed(&answer);
    let uuid = printed[0].lines().next().unwrap();
    assert_eq!(uuid.len(), 36, "{answer}");
    for (n, output) in printed.iter().enumerate() {
        assert_eq!(*output, format!("{uuid}\n{n}\na b {n}\n"));
        assert_eq!(answer["results"][n]["index"], n);
    }
    assert_eq!((&answer["passed"], &answer["compile"]["code"]), (&json!(true), &json!(0)));
    server.stop();
}

/// Builds with links, special files and names that are not text. None may be followed or harm another sandbox, and the
/// program runs in every case.
fn build_that_cannot_be_copied_is_compiled_for_each_input(engine: &str) {
    let server = serve(engine, &["script"], 2);
    let runs = |hostile: &str| {
        let code = format!(
            "uuid=$(cat /proc/sys/kernel/random/uuid)\nprintf '#!/bin/bash\necho '$uuid'\n{}' >out\nchmod 755 out\n{hostile}\n",
            "cat etc/passwd link/passwd 2>/dev/null | wc -l"
        );
        let answer =
            assert_ok(&post(&server, &[], &program("script", &code, json!([{}, {"args": ["1"]}, {"args": ["2"]}]))));
        assert_eq!(answer["passed"], true, "{hostile}: {answer}");
        let printed = printed(&answer).into_iter().map(str::to_owned);
        printed.collect::<HashSet<String>>().len()
    };
    assert_eq!(runs(""), 1);
    assert_eq!(runs("mkfifo pipe; ln -s / link2; ln -s ../../../.. up; ln out hard; ln -s loop loop"), 1);
    assert_eq!(runs("touch \"$(printf 'no\\ttext\\xff\\n')\" $'\\xfe\\xff'"), 1, "names that are not UTF-8");
    assert_eq!(runs("chmod u+s out; mkdir closed; chmod 555 closed"), 1);
    assert_eq!(runs("head -c 20000000 /dev/zero >large"), 1, "as large as the output of real compilers");
    assert_eq!(runs("for d in /work /tmp; do head -c 35000000 /dev/zero >$d/large; done"), 3, "too large");
    assert_eq!(runs("echo secret >closed; chmod 0 closed"), 3, "cannot be read");
    assert_eq!(runs("for n in {1..60}; do ln out hard$n; done; truncate -s 60000000 sparse"), 1);
    assert_eq!(runs("mkdir -p $(printf 'd/%.0s' {1..900})"), 1);
    let deep = "d=$(printf 'd%.0s' {1..200}); for n in {1..40}; do mkdir $d && cd $d || exit 0; done; exit 0";
    assert_eq!(runs(deep), 3, "too deep");
    server.stop();
}

/// A language whose source is a Python program that serves as compiler and as compiled program.
const DESCRIBING: &str = r#"
[limits]
processes = 100
[language.describing]
image = "localhost/coderunner-python:latest"
source = "main.py"
compile = ["python3", "main.py"]
artifact = "out"
run = ["python3", "out"]
health = { code = "open('out', 'w').write('print(\"hello\")')", output = "hello\n" }
"#;

/// Prints everything that can be observed of files, except what differs between any two runs: inode numbers, and times
/// of access and change. Modification times are comparable because `fix` sets them to a fixed value.
const DESCRIBE: &str = r#"
import ctypes, fcntl, hashlib, os, socket, stat, struct, sys, uuid
sys.setrecursionlimit(5000)
FIXED = 1_500_000_000_123_456_789
def contents(fd):
    size, parts, end, kept = os.fstat(fd).st_size, [], 0, hashlib.sha256()
    while end < size:
        try: start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError: break
        end = os.lseek(fd, start, os.SEEK_HOLE)
        parts.append((start, end))
    os.lseek(fd, 0, 0)
    while chunk := os.read(fd, 1 << 20): kept.update(chunk)
    return parts, kept.hexdigest()
def tell(place, said, known):
    for name in [entry.name for entry in os.scandir(place)]:
        if name in (b'unique', b'when'): continue
        meta, more = os.lstat(name), []
        kind = stat.S_IFMT(meta.st_mode)
        first = known.setdefault(meta.st_ino, len(known))
        try: more.append([(x, os.getxattr(name, x, follow_symlinks=False)) for x in os.listxattr(name, follow_symlinks=False)])
        except OSError as error: more.append(error.errno)
        if kind == stat.S_IFLNK: more.append(os.readlink(name))
        if kind in (stat.S_IFREG, stat.S_IFDIR):
            try:
                fd = os.open(name, os.O_RDONLY)
                try: more.append(struct.unpack('l', fcntl.ioctl(fd, 0x80086601, bytes(8))))
                except OSError as error: more.append(error.errno)
                if kind == stat.S_IFREG: more.append(contents(fd))
                os.close(fd)
            except OSError as error: more.append(error.errno)
        said.append(repr((name, oct(meta.st_mode), meta.st_nlink, meta.st_size, meta.st_blocks, meta.st_mtime_ns, first, more)))
        if kind == stat.S_IFDIR:
            try: os.chdir(name)
            except OSError: continue
            tell(b'.', said, known)
            os.chdir(b'..')
def told():
    said = []
    for place in ('/work', '/tmp', '/dev/shm'):
        os.chdir(place)
        tell(b'.', said, {})
        meta, free = os.stat(place), os.statvfs(place)
        said.append(repr((place, oct(meta.st_mode), meta.st_nlink, meta.st_size, free.f_bfree, free.f_ffree)))
    os.chdir('/work')
    said.append(repr([len(open('/proc/sysvipc/' + kind).readlines()) for kind in ('msg', 'sem', 'shm')]))
    said.append(str(os.stat('/tmp').st_mtime_ns - os.stat('/dev/shm/when').st_mtime_ns))
    said = '\n'.join(said)
    return said if len(said) < 20_000 else said[:2000] + hashlib.sha256(said.encode()).hexdigest()
def fix(place):
    for entry in list(os.scandir(place)):
        if entry.is_dir(follow_symlinks=False) and os.access(entry.name, os.X_OK):
            os.chdir(entry.name)
            fix('.')
            os.chdir('..')
        if os.lstat(entry.name).st_mtime_ns > FIXED + 10**17 and entry.name != 'when':
            os.utime(entry.name, ns=(FIXED, FIXED), follow_symlinks=False)
def file(name, mode=0o644, content=b'x'):
    with open(name, 'wb') as out: out.write(content)
    os.chmod(name, mode)
if __file__.endswith('out'):
    print(told())
    print(open('/work/unique').read(), file=sys.stderr)
    sys.exit()
source = open(__file__).read()
BUILD
os.chdir('/work')
open('out', 'w').write(source)
open('unique', 'w').write(str(uuid.uuid4()))
open('/dev/shm/when', 'w').close()
for place in ('/work', '/tmp', '/dev/shm'):
    os.chdir(place)
    fix('.')
meta = os.stat('/tmp')
os.utime('/dev/shm/when', ns=(meta.st_mtime_ns, meta.st_mtime_ns))
print(told())
"#;

/// What a build leaves, and whether it can be copied, so that a batch compiles only once.
const BUILDS: &[(&str, bool)] = &[
    ("pass", true),
    ("os.mkfifo('fifo', 0o640); os.link('fifo', 'other')", true),
    (
        "file('a'); os.mkdir('d'); os.link('a', 'd/b'); os.link('a', '0'); file('/tmp/t'); os.link('/tmp/t', '/tmp/u')",
        true,
    ),
    ("os.symlink('/nowhere', 'l'); os.link('l', 'm', follow_symlinks=False); os.symlink('x' * 4000, 'long')", true),
    ("[file(f'm{mode:o}', mode) for mode in (0o444, 0o4755, 0o2755, 0o6711, 0o1777, 0o755, 0o7777, 0o400)]", true),
    (
        "[(os.mkdir(f'd{mode:o}'), file(f'd{mode:o}/x'), os.chmod(f'd{mode:o}', mode)) for mode in (0o555, 0o1777, 0o2750, 0o500)]",
        true,
    ),
    (
        "[(file(f't{n}'), os.utime(f't{n}', ns=(n, n))) for n in (0, 1, 999_999_999, -2_000_000_001, 1_234_567_890_987_654_321)]",
        true,
    ),
    ("socket.socket(socket.AF_UNIX).bind('sock')", true),
    ("os.truncate(os.open('hole', os.O_CREAT | os.O_RDWR), 60_000_000)", true),
    (
        "f = os.open('holes', os.O_CREAT | os.O_RDWR); [os.pwrite(f, b'x' * 9, n * 50_000) for n in range(1, 40)]; os.truncate(f, 9_999_999)",
        true,
    ),
    ("file('zeros', content=bytes(1 << 20)); file('empty', content=b''); file('page', content=b'p' * 4096)", true),
    ("file('/tmp/x'); os.mkdir('/dev/shm/d'); file('/dev/shm/d/y'); os.mkfifo('/tmp/fifo')", true),
    ("[file(name) for name in (b'\\xff\\xfe', b'new\\nline', b'x' * 255, b'-rf', b'...', b' ', b'\\x80' * 255)]", true),
    ("[file(f'{n * 7919 % 3001}', content=b'%d' % n) for n in range(3000)]", true),
    (
        "[file(n) for n in 'abcdefg']; os.rename('c', 'z'); os.remove('e'); os.link('b', 'y'); file('e'); os.rename('a', 'g')",
        true,
    ),
    ("os.remove('main.py'); os.mkdir('main.py'); file('main.py/x')", true),
    ("[(os.mkdir('d'), os.chdir('d')) for _ in range(900)]", true),
    ("[(os.mkdir('d' * 250), os.chdir('d' * 250)) for _ in range(40)]", false),
    ("[(os.mkdir(f'w{n}'), [os.mkdir(f'w{n}/{m}') for m in range(30)]) for n in range(100)]", true),
    ("file('closed', 0)", false),
    ("os.mkdir('locked'); file('locked/x'); os.chmod('locked', 0)", false),
    ("os.mknod('device', stat.S_IFCHR, 0)", false),
    ("f = os.open('reserved', os.O_CREAT | os.O_RDWR); os.posix_fallocate(f, 0, 1 << 20)", false),
    ("libc = ctypes.CDLL(None); assert libc.semget(0x1234, 1, 0o1666) >= 0", false),
    ("file('large', content=bytes(40_000_000)); file('/tmp/large', content=bytes(40_000_000))", false),
];

fn copied_build_is_indistinguishable_from_a_local_one(engine: &str) {
    let config = format!("engine = {engine:?}\n{DESCRIBING}");
    let server =
        Server::start(Options { languages: &["describing"], containers: 3, config: &config, ..Options::default() });
    for (left, is_copied) in BUILDS {
        let code = DESCRIBE.replace("BUILD", left);
        let inputs = json!([{"args": ["1"]}, {"args": ["2"]}, {"args": ["3"]}]);
        let batch = assert_ok(&post(&server, &[], &program("describing", &code, inputs)));
        // One of the programs runs where it was compiled, the others run in copies, or where they were compiled again.
        let told = batch["compile"]["stdout"].as_str().unwrap();
        assert!(told.len() > 200, "{left}: {batch}");
        let results = batch["results"].as_array().unwrap();
        for result in results {
            assert_eq!(
                (&result["verdict"], &result["run"]["stdout"]),
                (&json!("ok"), &json!(told)),
                "{left}: {result}"
            );
        }
        let made: HashSet<&str> = results.iter().map(|result| result["run"]["stderr"].as_str().unwrap()).collect();
        assert_eq!(made.len(), if *is_copied { 1 } else { 3 }, "{left}");
    }
    // Only newer kernels support these attributes and flags on tmpfs. Where they exist, a copy keeps them.
    for left in [
        "file('a'); os.setxattr('a', 'user.x', b'y')",
        "file('a'); os.setxattr('a', 'system.posix_acl_access', struct.pack('<I' + 'HHI' * 5, 2, 1, 6, 2**32 - 1, 2, 4, 4242, 4, 4, 2**32 - 1, 16, 4, 2**32 - 1, 32, 4, 2**32 - 1))",
        "file('a'); fcntl.ioctl(os.open('a', os.O_RDONLY), 0x40086602, struct.pack('l', 0x40))",
    ] {
        let code = DESCRIBE.replace("BUILD", &format!("try:\n    {left}\nexcept OSError: pass"));
        let inputs = json!([{"args": ["1"]}, {"args": ["2"]}]);
        let batch = assert_ok(&post(&server, &[], &program("describing", &code, inputs)));
        let told = &batch["compile"]["stdout"];
        for result in batch["results"].as_array().unwrap() {
            assert_eq!((&result["verdict"], &result["run"]["stdout"]), (&json!("ok"), told), "{left}: {result}");
        }
    }
    server.stop();
}

#[test]
fn each_batch_input_has_its_own_verdict_and_passed_flag() {
    let server = serve("", &["c"], 2);
    let code = r#"
        #include <stdio.h>
        int main(void) {
            int n;
            if (scanf("%d", &n) != 1) return 3;
            if (n < 0) *(volatile int *)0 = 1;
            printf("%d \n", n * n);
            return 0;
        }"#;
    let inputs = json!([
        {"stdin": "3", "expected_output": "9"}, {"stdin": "4", "expected_output": "17\n"}, {"stdin": "x"},
        {"stdin": "-1"}, {"stdin": "5"}, {"expected_output": "49\n"},
    ]);
    let mut body = program("c", code, inputs);
    body["stdin"] = "7".into();
    let answer = assert_ok(&post(&server, &[], &body));
    let verdicts: Vec<(&str, bool)> = answer["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|result| (result["verdict"].as_str().unwrap(), result["passed"].as_bool().unwrap()))
        .collect();
    let expected =
        [("ok", true), ("ok", false), ("runtime_error", false), ("signalled", false), ("ok", true), ("ok", true)];
    assert_eq!(verdicts, expected, "{answer}");
    assert_eq!((&answer["language"], &answer["passed"]), (&json!("c"), &json!(false)));

    // Outcomes are cached like those of single runs, and shared with them.
    let again = assert_ok(&post(&server, &[], &body));
    assert!(again["results"].as_array().unwrap().iter().all(|result| result["cached"] == true), "{again}");
    let single = json!({"language": "c", "version": "*", "files": body["files"], "stdin": "5"});
    let single = assert_ok(&server.request("POST", "/api/v2/execute", &[JSON], single.to_string().as_bytes()));
    assert_eq!((&single["cached"], &single["run"]["stdout"]), (&json!(true), &json!("25 \n")), "{single}");

    // Equal inputs share runs: at most two take place.
    let equal = program("c", "int main(void) { return 0; }", json!(vec![json!({}); 100]));
    let answer = assert_ok(&post(&server, &[], &equal));
    let times = answer["results"].as_array().unwrap().iter().map(|result| result["run"]["wall_time"].to_string());
    assert!(answer["passed"] == true && times.collect::<HashSet<_>>().len() <= 2, "{answer}");

    let answer =
        assert_ok(&post(&server, &[], &program("c", "int main(void) { return x; }", json!([{}, {"stdin": "1"}]))));
    assert!(answer["compile"]["stderr"].as_str().unwrap().contains('x'), "{answer}");
    for result in answer["results"].as_array().unwrap() {
        assert_eq!((&result["verdict"], result.get("run")), (&json!("compile_error"), None), "{answer}");
    }
    server.stop();
}

#[test]
fn batch_build_setting_limits_the_size_of_copied_builds() {
    let config = format!("batch = {{ build = \"1MiB\" }}\n{SCRIPT}");
    let server =
        Server::start(Options { languages: &["script"], containers: 2, config: &config, ..Options::default() });
    for (bytes, compiled) in [(1_000_000, 1), (1_100_000, 2)] {
        let code = format!(
            "head -c {bytes} /dev/zero >large; echo \"#!/bin/bash\necho $(cat /proc/sys/kernel/random/uuid)\" >out; chmod +x out"
        );
        let answer = assert_ok(&post(&server, &[], &program("script", &code, json!([{}, {"args": ["1"]}]))));
        assert_eq!(printed(&answer).into_iter().collect::<HashSet<_>>().len(), compiled, "{answer}");
    }
    server.stop();
}

#[test]
fn batch_results_are_streamed_as_json_lines() {
    let server = Shared::start(&["bash"], "");
    let inputs: Vec<Value> = (0..5).map(|n| json!({"args": [n.to_string()], "expected_output": "3"})).collect();
    let body = program("bash", "echo $1", json!(inputs)).to_string();
    let all = server.begin_request("POST", "/api/v2/batch", &[JSON, LINES], body.as_bytes()).read_to_end();
    let text = String::from_utf8(all).unwrap();
    assert!(text.contains("content-type: application/x-ndjson"), "{text}");
    let lines: Vec<Value> =
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).filter(Value::is_object).collect();
    assert_eq!(lines[0], json!({"language": "bash", "version": "5.0.0"}), "{text}");
    let mut passed: Vec<(u64, bool)> =
        lines[1..].iter().map(|line| (line["index"].as_u64().unwrap(), line["passed"].as_bool().unwrap())).collect();
    passed.sort_unstable();
    assert_eq!(passed, [(0, false), (1, false), (2, false), (3, true), (4, false)], "{text}");
}

#[test]
fn expected_output_is_compared_with_stdout_only() {
    let config = "[limits]\noutput = \"1KiB\"";
    let server = Server::start(Options { languages: &["bash"], config, ..Options::default() });
    let code = "echo out; head -c $1 /dev/zero >&2; head -c $2 /dev/zero | tr '\\0' x";
    let inputs = json!([
        {"args": ["5000", "0"], "expected_output": "out"},
        {"args": ["0", "5000"], "expected_output": format!("out\n{}", "x".repeat(1020))},
    ]);
    let answer = assert_ok(&post(&server, &[], &program("bash", code, inputs)));
    let result = |index: usize, what: &str| answer["results"][index][what].clone();
    assert_eq!((result(0, "passed"), result(0, "truncated")), (json!(true), json!(true)), "{answer}");
    assert_eq!((result(1, "passed"), result(1, "truncated")), (json!(false), json!(true)), "{answer}");
    server.stop();
}

#[test]
fn inputs_refused_by_a_full_queue_do_not_fail_the_other_inputs() {
    let config = "queue = { length = 1 }";
    let server = Server::start(Options { languages: &["bash"], containers: 1, config, ..Options::default() });
    for headers in [&[JSON][..], &[JSON, LINES]] {
        let inputs: Vec<Value> = (0..4).map(|n| json!({ "args": [n.to_string()] })).collect();
        let body = program("bash", &format!("sleep 1; echo $1 #{}", headers.len()), json!(inputs)).to_string();
        let all = server.begin_request("POST", "/api/v2/batch", headers, body.as_bytes()).read_to_end();
        let text = String::from_utf8(all).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        assert!(text.contains("\"stdout\":\"0\\n\"") && text.contains("queue is full"), "{text}");
    }
    server.stop();
}

#[test]
fn client_disconnect_cancels_its_batch() {
    let server = serve("", &["bash"], 2);
    for headers in [&[JSON][..], &[JSON, LINES]] {
        let marks = [marked_seconds(60), marked_seconds(60), marked_seconds(60)];
        let inputs: Vec<Value> = marks.iter().map(|mark| json!({ "args": [mark] })).collect();
        let body = program("bash", "sleep $1", json!(inputs)).to_string();
        let batch = server.begin_request("POST", "/api/v2/batch", headers, body.as_bytes());
        eventually("each container runs a program", || {
            (marks.iter().filter(|mark| !marked(mark).is_empty()).count() == 2).then_some(())
        });
        drop(batch);
        marks.iter().for_each(|mark| wait_gone(mark));
    }
    server.stop();
}

#[test]
fn batch_without_any_outcome_returns_an_error() {
    let server = Server::start(Options {
        languages: &["bash"],
        containers: 1,
        config: "queue = { wait = \"1s\" }",
        ..Options::default()
    });
    let refused = |body: &Value, status: u16, word: &str| {
        let reply = post(&server, &[], body);
        assert_eq!(reply.status, status, "{}", String::from_utf8_lossy(&reply.body));
        assert!(reply.message().contains(word), "{word}: {}", reply.message());
        reply
    };
    let hello = |inputs: Value| program("bash", "echo hello", inputs);
    refused(&hello(json!([])), 400, "inputs");
    refused(&hello(json!(vec![json!({}); 101])), 400, "inputs");
    refused(&hello(json!([{"args": ["\0"]}])), 400, "NUL");
    refused(&hello(json!([{"stdin": 1}])), 400, "\"inputs\"");
    refused(&program("cobol", "", json!([{}])), 400, "cobol");
    let mark = marked_seconds(60);
    let busy = server.begin(&format!("sleep {mark}"));
    wait_running(&mark);
    let reply = refused(&hello(json!([{}, {}])), 503, "became free");
    assert!(reply.header("retry-after").is_some());
    drop(busy);
    let reply = eventually("an outcome", || Some(post(&server, &[], &hello(json!([{}])))).filter(|r| r.status == 200));
    assert_eq!(printed(&reply.json()), ["hello\n"]);
    server.stop();
}
