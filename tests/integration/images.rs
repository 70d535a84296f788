//! Images: missing ones are pulled, healthy new versions replace old ones, and unhealthy new versions are rejected.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::panic::AssertUnwindSafe;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use serde_json::json;

use crate::client::Answer;
use crate::fake_podman::FakePodman;
use crate::harness::{Files, Options, Server, eventually, marked_seconds, output, wait_gone, wait_running};
use crate::leftovers::{self, podman};
use crate::registry::{EMPTY, Image, Registry, SHELL};

/// A program that prints the version of its image.
const VERSION: &str = "cat /version";

/// Configures the language `bash` with an image whose health program prints the image's file `/health`.
fn config(image: &Image) -> String {
    format!("[language.bash]\nimage = {:?}\nhealth = {{ code = \"cat /health\", output = \"well\" }}\n", image.name)
}

/// The files of a healthy version.
fn version(version: &str) -> [(&str, &str); 2] {
    [("version", version), ("health", "well")]
}

/// Like [`config`], for one engine.
fn config_for(engine: &str, image: &Image) -> String {
    format!("engine = {engine:?}\n{}", config(image))
}

fn options<'a>(config: &'a str, env: &'a [(&'a str, &'a str)]) -> Options<'a> {
    Options { languages: &["bash"], config, env, ..Options::default() }
}

/// Runs `coderunner update`, and returns its exit code and stdout.
fn update(files: &Files, options: &Options) -> (i32, String) {
    let output = output(&mut files.command("update", options), b"");
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code().expect("killed by a signal"), String::from_utf8(output.stdout).unwrap())
}

#[track_caller]
fn assert_updated((code, text): (i32, String), words: &[&str]) {
    assert_eq!(code, 0, "{text}");
    assert!(words.iter().all(|word| text.contains(word)), "no {words:?}: {text}");
    assert_eq!(text.lines().count(), 1, "one line per image: {text}");
}

#[track_caller]
fn assert_not_updated((code, text): (i32, String), words: &[&str]) {
    assert_eq!(code, 1, "{text}");
    assert!(words.iter().all(|word| text.contains(word)), "no {words:?}: {text}");
}

/// Waits until requests are refused with a message that contains these words.
fn wait_refused(server: &Server, words: &str) {
    let refused = eventually(&format!("a refusal because of {words:?}"), || {
        let reply = server.begin(VERSION).reply();
        reply.message().contains(words).then_some(reply)
    });
    assert_eq!(refused.status, 503);
    assert!(refused.message().contains("bash"), "{}", refused.message());
    let after = refused.header("retry-after").expect("Retry-After");
    assert!(after.parse::<u32>().is_ok_and(|seconds| seconds > 0), "{after}");
}

on_each_engine! {
    update_switches_to_the_new_version_and_deletes_the_old_one
    unhealthy_new_version_is_rejected_and_removed
    update_under_load_fails_no_request
    image_deleted_under_load_is_pulled_again
    server_killed_during_an_image_check_restarts_with_the_old_image
}

/// The abbreviated form of an image id.
fn short(id: &str) -> &str {
    &id[..12]
}

#[test]
fn missing_image_is_pulled_while_other_languages_work() {
    let registry = Registry::start();
    let image = registry.image();
    let id = registry.push(&image, SHELL, &version("one"));
    let fake = FakePodman::new("[ \"$1\" != pull ] || while [ -e podman ] && [ ! -e go ]; do sleep 0.05; done");
    let (config, env) = (config(&image), registry.env());
    let server =
        Server::launch(Options { languages: &["bash", "c"], path: Some(fake.dir()), ..options(&config, &env) });

    wait_refused(&server, "is being pulled");
    eventually("the other language is ready", || {
        let readyz = server.get("/readyz");
        assert_eq!(readyz.status, 503);
        let body = readyz.json();
        assert_eq!(body["languages"]["bash"]["ready"], false);
        (body["languages"]["c"]["ready"] == true).then_some(())
    });

    fake.set_flag("go");
    server.wait_ready();
    assert_eq!(server.run(VERSION).run_output, "one");
    assert_eq!(image.id(), Some(id));
    server.stop();
}

#[test]
fn servers_started_at_once_keep_their_image_names() {
    // Each `podman tag` waits up to a second for those of the other servers, so that they happen at the same time.
    let fake = FakePodman::new(
        "[ \"$1\" = tag ] || exit 0
        echo x >>come; waited=0
        while [ $(wc -l <come) -lt 4 ] && [ $waited -lt 10 ]; do sleep 0.1; waited=$((waited + 1)); done",
    );
    let options = Options { languages: &["bash"], containers: 1, path: Some(fake.dir()), ..Options::default() };
    let servers: Vec<Server> = (0..4).map(|_| Server::launch(options.clone())).collect();
    for server in &servers {
        server.wait_ready();
    }
    for server in &servers {
        assert_eq!(
            leftovers::image_names(&server.instance).len(),
            1,
            "podman before 4.8 loses image names when several are set at once"
        );
    }
    servers.into_iter().for_each(Server::stop);
}

#[test]
fn failed_pull_of_a_missing_image_is_retried() {
    let registry = Registry::start();
    let image = registry.image();
    registry.push(&image, SHELL, &version("one"));
    registry.stop();
    let (config, env) = (config(&image), registry.env());
    let options = options(&config, &env);
    let server = Server::launch(options.clone());
    server.wait_log(&["ERROR", &image.name, "connection refused"]);
    wait_refused(&server, "cannot be pulled");
    registry.restart();
    server.wait_ready();
    assert_eq!(server.run(VERSION).run_output, "one");
    server.stop();
}

fn update_switches_to_the_new_version_and_deletes_the_old_one(engine: &str) {
    let registry = Registry::start();
    let image = registry.image();
    let old = registry.push(&image, SHELL, &version("one"));
    let config = config_for(engine, &image) + "limits = { run_time = \"1m\" }\n";
    let env = registry.env();
    let options = options(&config, &env);
    let server = Server::start(options.clone());
    assert_eq!(server.run(VERSION).run_output, "one");
    let mark = marked_seconds(50);
    let running = server.begin(&format!("sleep {mark}; cat /version"));
    wait_running(&mark);

    let new = registry.push(&image, SHELL, &version("two"));
    assert_updated(update(server.files(), &options), &[&image.name, short(&new), short(&old), "replaces"]);
    // The cached answer of the old version is not used.
    assert_eq!(server.run(VERSION).run_output, "two");
    assert!(!running.has_begun());
    assert!(image.stored().contains(&old), "the old image was deleted under a job");
    leftovers::kill_marked(&mark);
    assert!(running.reply().answer().run_output.ends_with("one"));
    image.wait_stored(&[&new]);
    assert_eq!(image.id(), Some(new));
    server.stop();
}

fn update_under_load_fails_no_request(engine: &str) {
    let registry = Registry::start();
    let image = registry.image();
    let old = registry.push(&image, SHELL, &version("one"));
    let (config, env) = (config_for(engine, &image), registry.env());
    let options = Options { containers: 3, ..options(&config, &env) };
    let server = Server::start(options.clone());
    let new = registry.push(&image, SHELL, &version("two"));
    let (updated, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    let seen: BTreeSet<String> = std::thread::scope(|scope| {
        let (server, updated, served) = (&server, &updated, &served);
        let client = move |number: usize| {
            let mut seen = BTreeSet::new();
            // Each program is different, so none is answered from the cache. The last one runs after the update.
            for count in 0.. {
                let last = updated.load(Ordering::SeqCst);
                let answer = server.run(&format!("cat /version # {number} {count}"));
                if last {
                    assert_eq!(answer.run_output, "two");
                    break;
                }
                seen.insert(answer.run_output);
                served.fetch_add(1, Ordering::SeqCst);
            }
            seen
        };
        let clients: Vec<_> = (0..4).map(|number| scope.spawn(move || client(number))).collect();
        eventually("the clients are served", || (served.load(Ordering::SeqCst) >= 4).then_some(()));
        // A panic has to wait until the clients have been told to stop, or they would run for ever.
        let update_result = std::panic::catch_unwind(AssertUnwindSafe(|| update(server.files(), &options)));
        updated.store(true, Ordering::SeqCst);
        match update_result {
            Ok(result) => assert_updated(result, &[short(&new), short(&old)]),
            Err(panic) => std::panic::resume_unwind(panic),
        }
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    assert!(seen.iter().all(|version| version == "one" || version == "two"), "{seen:?}");
    image.wait_stored(&[&new]);
    server.stop();
}

fn image_deleted_under_load_is_pulled_again(engine: &str) {
    let registry = Registry::start();
    let image = registry.image();
    let id = registry.push(&image, SHELL, &version("one"));
    let (config, env) = (config_for(engine, &image), registry.env());
    let server = Server::start(Options { containers: 3, ..options(&config, &env) });
    let over = AtomicBool::new(false);
    // An odd number while the image may be missing, an even one while it exists.
    let changes = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (server, over, changes) = (&server, &over, &changes);
        let client = move |number: usize| {
            for count in 0.. {
                let before = changes.load(Ordering::SeqCst);
                let reply = server.begin(&format!("{VERSION} # {number} {count}")).reply();
                let existed = before.is_multiple_of(2) && changes.load(Ordering::SeqCst) == before;
                match reply.status {
                    // Only a program that runs while its image is deleted may miss files.
                    200 => {
                        let answer = reply.answer();
                        let lost_files = !existed && answer.run_output.contains("No such file or directory");
                        assert!(lost_files || answer == Answer::ran("one"), "{answer:?}");
                    }
                    503 => {}
                    status => assert!(status == 500 && !existed, "{reply:?}"),
                }
                if over.load(Ordering::SeqCst) {
                    break;
                }
            }
        };
        for number in 0..3 {
            scope.spawn(move || client(number));
        }
        // A panic has to wait until the clients have been told to stop, or they would run for ever.
        let deleted = std::panic::catch_unwind(AssertUnwindSafe(|| {
            for _ in 0..2 {
                changes.fetch_add(1, Ordering::SeqCst);
                // `podman rmi` fails while a container of the image is being created.
                eventually("the image is deleted", || {
                    let said = output(Command::new("podman").args(["rmi", "--force", "--", &id]), b"").stdout;
                    String::from_utf8_lossy(&said).contains("Deleted: ").then_some(())
                });
                image.wait_stored(&[&id]);
                changes.fetch_add(1, Ordering::SeqCst);
                eventually("answers again", || {
                    let reply = server.begin(&format!("{VERSION} # {}", marked_seconds(0))).reply();
                    (reply.status == 200).then(|| assert_eq!(reply.answer(), Answer::ran("one")))
                });
            }
        }));
        over.store(true, Ordering::SeqCst);
        deleted.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    assert_eq!(server.run(&format!("{VERSION} # after")), Answer::ran("one"));
    server.stop();
}

fn unhealthy_new_version_is_rejected_and_removed(engine: &str) {
    let registry = Registry::start();
    let image = registry.image();
    let old = registry.push(&image, SHELL, &version("one"));
    let (config, env) = (config_for(engine, &image), registry.env());
    let options = options(&config, &env);
    let server = Server::start(options.clone());
    assert_eq!(server.run(VERSION).run_output, "one");

    let unhealthy = [("version", "two"), ("health", "ill")];
    for (base, files, why) in [(SHELL, &unhealthy[..], "ill"), (EMPTY, &version("three")[..], "bash")] {
        registry.push(&image, base, files);
        assert_not_updated(update(server.files(), &options), &[&image.name, "nothing changed", why]);
        server.wait_log(&["WARN", &image.name, "nothing changed", why]);
        assert_eq!(server.run(&format!("{VERSION} # after {why}")).run_output, "one");
        assert_eq!(image.id().as_ref(), Some(&old), "the public name still means the old version");
        image.wait_stored(&[&old]);
    }

    let new = registry.push(&image, SHELL, &version("four"));
    assert_updated(update(server.files(), &options), &[short(&new), "replaces", short(&old)]);
    assert_eq!(server.run(VERSION).run_output, "four");
    image.wait_stored(&[&new]);
    server.stop();
}

#[test]
fn unhealthy_first_version_is_not_used() {
    let registry = Registry::start();
    let image = registry.image();
    registry.push(&image, SHELL, &[("version", "one"), ("health", "ill")]);
    let (config, env) = (config(&image), registry.env());
    let options = options(&config, &env);
    let server = Server::launch(options.clone());
    server.wait_log(&["ERROR", &image.name, "ill"]);
    wait_refused(&server, "health check");

    registry.push(&image, SHELL, &version("two"));
    // The server may have retried by itself just before.
    assert_updated(update(server.files(), &options), &["in use"]);
    server.wait_ready();
    assert_eq!(server.run(VERSION).run_output, "two");
    server.stop();
}

#[test]
fn image_shared_by_two_languages_must_work_for_both() {
    let registry = Registry::start();
    let image = registry.image();
    let both = |other: &'static str| [("version", "any"), ("health", "well"), ("other", other)];
    let old = registry.push(&image, SHELL, &both("well"));
    let config = format!(
        "{}[language.other]\nimage = {:?}\nsource = \"main.sh\"\nrun = [\"sh\", \"main.sh\"]\n\
         health = {{ code = \"cat /other\", output = \"well\" }}\n",
        config(&image),
        image.name
    );
    let env = registry.env();
    let options = Options { languages: &["bash", "other"], ..options(&config, &env) };
    let server = Server::start(options.clone());
    registry.push(&image, SHELL, &both("ill"));
    assert_not_updated(update(server.files(), &options), &["other", "ill"]);
    image.wait_stored(&[&old]);
    let new = registry.push(&image, SHELL, &both("well"));
    assert_updated(update(server.files(), &options), &[short(&new), "replaces"]);
    server.stop();
}

#[test]
fn unreachable_registry_changes_nothing_even_after_a_restart() {
    let registry = Registry::start();
    let image = registry.image();
    let old = registry.push(&image, SHELL, &version("one"));
    let (config, env) = (config(&image), registry.env());
    let options = options(&config, &env);
    let server = Server::start(options.clone());
    registry.stop();
    let words = [&image.name, "nothing changed", "cannot be pulled", "connection refused"];
    assert_not_updated(update(server.files(), &options), &words);
    assert_eq!(server.run(VERSION).run_output, "one");

    let server = Server::launch_with(server.crash(), &options);
    server.wait_ready();
    assert_eq!(server.run(VERSION).run_output, "one");
    image.wait_stored(&[&old]);

    registry.restart();
    assert_updated(update(server.files(), &options), &["the newest is in use"]);
    server.stop();
}

#[test]
fn update_reports_when_the_newest_version_is_in_use() {
    let registry = Registry::start();
    let image = registry.image();
    let id = registry.push(&image, SHELL, &version("one"));
    let (config, env) = (config(&image), registry.env());
    let options = options(&config, &env);
    let server = Server::start(options.clone());
    assert_updated(update(server.files(), &options), &[&image.name, "the newest is in use"]);
    assert_eq!(server.run(VERSION).run_output, "one");
    image.wait_stored(&[&id]);
    server.stop();
}

#[test]
fn update_switches_to_a_rebuilt_local_image() {
    let image = Image::local();
    let old = image.build(&version("one"));
    let config = config(&image);
    let options = options(&config, &[]);
    let server = Server::start(options.clone());
    let new = image.build(&version("two"));
    assert_eq!(server.run(VERSION).run_output, "one");
    assert_updated(update(server.files(), &options), &[short(&new), "replaces", short(&old)]);
    assert_eq!(server.run(VERSION).run_output, "two");
    image.wait_stored(&[&new]);
    server.stop();
}

#[test]
fn missing_local_image_is_not_pulled() {
    let image = Image::local();
    let config = config(&image);
    let options = options(&config, &[]);
    let server = Server::launch(options.clone());
    server.wait_log(&["ERROR", &image.name, "build it"]);
    wait_refused(&server, "not installed");
    assert_not_updated(update(server.files(), &options), &[&image.name, "build it"]);
    image.build(&version("one"));
    assert_updated(update(server.files(), &options), &[&image.name, "in use"]);
    server.wait_ready();
    assert_eq!(server.run(VERSION).run_output, "one");
    server.stop();
}

#[test]
fn new_versions_are_checked_for_periodically() {
    let registry = Registry::start();
    let image = registry.image();
    registry.push(&image, SHELL, &version("one"));
    let config = config(&image) + "[update]\ninterval = \"1s\"\n";
    let env = registry.env();
    let server = Server::start(options(&config, &env));
    let mut newest = String::new();
    for version_now in ["two", "three"] {
        newest = registry.push(&image, SHELL, &version(version_now));
        eventually("the new version is in use", || (server.run(VERSION).run_output == version_now).then_some(()));
    }
    image.wait_stored(&[&newest]);
    server.stop();
}

#[test]
fn update_schedule_survives_restarts_and_clock_changes() {
    let registry = Registry::start();
    let image = registry.image();
    registry.push(&image, SHELL, &version("one"));
    let (config, env) = (config(&image), registry.env());
    let options = options(&config, &env);
    let server = Server::start(options.clone());
    assert_eq!(server.run(VERSION).run_output, "one");
    let day = Duration::from_secs(24 * 3600);
    let stamp = server.files().dir().join(format!("state/coderunner/{}.updated", server.instance));
    let set_stamp = |time| File::options().write(true).open(&stamp).unwrap().set_modified(time).unwrap();

    // The update interval ended while the server did not run.
    let files = server.crash();
    let newest = registry.push(&image, SHELL, &version("two"));
    set_stamp(SystemTime::now() - 8 * day);
    let server = Server::launch_with(files, &options);
    server.wait_ready();
    eventually("the new version is in use", || (server.run(VERSION).run_output == "two").then_some(()));
    image.wait_stored(&[&newest]);

    // The clock was years ahead when the time was saved: the interval starts now, not at that time.
    let files = server.crash();
    set_stamp(SystemTime::now() + 1000 * day);
    let server = Server::launch_with(files, &options);
    eventually("the time of the last update is saved again", || {
        (fs::metadata(&stamp).unwrap().modified().unwrap() <= SystemTime::now()).then_some(())
    });
    server.wait_ready();
    assert_eq!(server.run(VERSION).run_output, "two");
    server.stop();
}

#[test]
fn update_works_without_a_server() {
    let registry = Registry::start();
    let image = registry.image();
    let old = registry.push(&image, SHELL, &version("one"));
    let (config, env) = (config(&image), registry.env());
    let options = options(&config, &env);
    let files = Files::new(&options);
    assert_updated(update(&files, &options), &[&image.name, short(&old), "in use"]);
    assert_updated(update(&files, &options), &["the newest is in use"]);
    registry.push(&image, SHELL, &[("health", "ill")]);
    assert_not_updated(update(&files, &options), &["ill"]);
    let new = registry.push(&image, SHELL, &version("two"));
    assert_updated(update(&files, &options), &[short(&new), "replaces", short(&old)]);
    assert_eq!(image.stored(), BTreeSet::from([new]));
    leftovers::assert_none(&files.instance);
}

fn server_killed_during_an_image_check_restarts_with_the_old_image(engine: &str) {
    let registry = Registry::start();
    let image = registry.image();
    let config = config_for(engine, &image).replace("cat /health", ". /health") + "limits = { run_time = \"1m\" }\n";
    let env = registry.env();
    let options = options(&config, &env);
    let healthy = |version| [("version", version), ("health", "printf well")];
    registry.push(&image, SHELL, &healthy("one"));
    let server = Server::start(options.clone());
    assert_eq!(server.run(VERSION).run_output, "one");

    let mark = marked_seconds(50);
    let slow = format!("sleep {mark}; printf well");
    let second = registry.push(&image, SHELL, &[("version", "two"), ("health", &slow)]);
    let mut command = server.files().command("update", &options).stderr(Stdio::null()).spawn().unwrap();
    wait_running(&mark);
    assert_eq!(image.id().as_ref(), Some(&second), "the public name means the new version before it is checked");
    let files = server.crash();
    let status = eventually("the update command exits", || command.try_wait().unwrap());
    assert_eq!(status.code(), Some(1));
    wait_gone(&mark);

    let server = Server::launch_with(files, &options);
    server.wait_ready();
    assert_eq!(server.run(VERSION).run_output, "one");
    let third = registry.push(&image, SHELL, &healthy("three"));
    assert_updated(update(server.files(), &options), &[short(&third), "replaces"]);
    assert_eq!(server.run(VERSION).run_output, "three");
    image.wait_stored(&[&third]);
    server.stop();
}

#[test]
fn only_failed_images_are_retried_and_rarely_pulled() {
    let registry = Registry::start();
    let (good, other, bad) = (registry.image(), registry.image(), registry.image());
    registry.push(&good, SHELL, &version("one"));
    registry.push(&other, SHELL, &version("one"));
    registry.push(&bad, SHELL, &[("version", "one"), ("health", "ill")]);
    let language = |name: &str, image: &Image| {
        format!(
            "[language.{name}]\nimage = {:?}\nsource = \"main.sh\"\nrun = [\"sh\", \"main.sh\"]\n\
             health = {{ code = \"cat /health\", output = \"well\" }}\n",
            image.name
        )
    };
    let config = config(&good) + &language("other", &other) + &language("third", &bad);
    let env = registry.env();
    let options = Options { languages: &["bash", "other", "third"], containers: 3, ..options(&config, &env) };
    let server = Server::start(options.clone());
    let failures = |count: usize| {
        eventually("the health check failed this often", || {
            let log = server.log();
            let failed =
                log.lines().filter(|line| line.contains(&bad.name) && line.contains("health program of third"));
            (failed.count() >= count).then_some(())
        });
    };
    failures(1);
    let pulls = || [&good, &other, &bad].map(|image| registry.pulls(image));
    let first = pulls();
    assert!(first.iter().all(|pulls| *pulls > 0), "{first:?}");
    failures(3);
    assert_eq!(pulls(), first, "working images are left alone, and the unhealthy one is only checked again");

    registry.push(&bad, SHELL, &version("two"));
    let (code, text) = update(server.files(), &options);
    assert_eq!((code, text.lines().count()), (0, 3), "{text}");
    let then = pulls();
    assert!(
        then.iter().zip(first).all(|(then, first)| *then > first),
        "{then:?}: `coderunner update` pulls all images"
    );
    server.wait_each_ready();
    server.stop();
}

#[test]
fn unsaved_update_time_does_not_cause_repeated_updates() {
    let registry = Registry::start();
    let image = registry.image();
    registry.push(&image, SHELL, &version("one"));
    let (config, env) = (config(&image), registry.env());
    let options = options(&config, &env);
    let files = Files::new(&options);
    let stamp = files.dir().join(format!("state/coderunner/{}.updated", files.instance));
    // A directory in place of the file makes saving fail.
    fs::create_dir_all(&stamp).unwrap();
    File::open(&stamp).unwrap().set_modified(SystemTime::now() - Duration::from_secs(8 * 24 * 3600)).unwrap();
    let server = Server::launch_with(files, &options);
    server.wait_log(&["cannot save the time of the update"]);
    server.wait_ready();
    let pulls = registry.pulls(&image);
    // Twice as long as a further pull would take.
    std::thread::sleep(Duration::from_secs(10));
    assert_eq!(registry.pulls(&image), pulls);
    server.stop();
}

/// The groups that `podman run` gives to the user of an image, without the root group.
fn groups_with_podman(image: &Image) -> BTreeSet<u32> {
    let ids = "grep -E '^(Gid|Groups)' /proc/self/status";
    let args = ["run", "--rm", "--network=none", "--log-driver=none", "--entrypoint=sh", "--", &image.name, "-c", ids];
    // `--entrypoint=sh` also finds the tools in the user's home directory, where the user may enter it.
    podman(&args).split_whitespace().filter_map(|word| word.parse().ok()).filter(|gid| *gid != 0).collect()
}

#[test]
fn programs_have_the_same_groups_as_with_podman_run() {
    // Home directories have these modes in Debian. The user is also in the root group, which programs must not get.
    let home = "RUN echo maker:x:1000:1001::/home/maker:/bin/sh >>/etc/passwd \
        && printf 'maker:x:1001:\\ntools:x:60:other,maker\\nwheel:x:0:maker\\nothers:x:61:other\\n' >>/etc/group \
        && mkdir -p /home/maker/bin && printf '#!/bin/sh\\nexec sh \"$@\"\\n' >/home/maker/bin/greet \
        && echo secret >/home/maker/own && chmod 750 /home/maker /home/maker/bin/greet && chmod 640 /home/maker/own \
        && chown -R 1000:1001 /home/maker \
        && echo tools >/tools && chown 0:60 /tools && chmod 640 /tools && echo root >/root-only && chmod 660 /root-only\n\
        ENV PATH=/home/maker/bin:/usr/bin:/bin\nWORKDIR /home\nENTRYPOINT [\"/bin/false\"]\nCMD [\"nothing\"]\n";
    // User, groups, and what the user can enter and read.
    let (all, home_alone) = ("well secret tools", "well secret");
    let users = [
        ("maker", &[60, 1001][..], all),
        ("1000", &[60, 1001], all),
        ("1000:1001", &[1001], home_alone),
        ("maker:maker", &[1001], home_alone),
        ("maker:tools", &[60], "tools"),
        ("4321", &[], ""),
        ("4321:1001", &[1001], home_alone),
        ("root", &[], ""),
    ];
    let base = Image::local();
    base.build_with(home);
    let images = users.map(|(user, groups, _)| {
        let image = Image::local();
        image.build_from(&base, &format!("USER {user}"));
        assert_eq!(groups_with_podman(&image), groups.iter().copied().collect(), "{user}");
        image
    });
    let look = "greet -c 'echo well'; cat /home/maker/own; cat /tools; cat /root-only; echo >/root-only; ls /job\n\
        cat /proc/1/environ; grep Groups /proc/self/status";
    // Users who cannot enter the home directory have no `greet`.
    let run = |found: &str| if found.contains("well") { "greet" } else { "sh" };
    let mut languages = String::new();
    for (number, (image, (_, _, found))) in images.iter().zip(users).enumerate() {
        languages += &format!(
            "[language.user-{number}]\nimage = {:?}\nsource = \"main.sh\"\nrun = [{:?}, \"main.sh\"]\n\
             health = {{ code = \"echo well\", output = \"well\\n\" }}\n",
            image.name,
            run(found)
        );
    }
    let names: Vec<String> = (0..users.len()).map(|number| format!("user-{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for engine in ["podman", "direct"] {
        let server = Server::start(Options {
            languages: &names,
            containers: users.len(),
            config: &format!("engine = {engine:?}\n{languages}"),
            ..options("", &[])
        });
        server.wait_each_ready();
        for (name, (user, groups, found)) in names.iter().zip(users) {
            let body = json!({ "language": name, "files": [{ "content": format!("exec 2>/dev/null\n{look}") }] });
            let headers = [("Content-Type", "application/json")];
            let answer = server.request("POST", "/api/v2/execute", &headers, body.to_string().as_bytes()).json();
            let groups: Vec<String> = groups.iter().map(u32::to_string).collect();
            let expected: String = found.split_whitespace().map(|word| format!("{word}\n")).collect();
            assert_eq!(
                answer["run"]["stdout"],
                format!("{expected}Groups:\t{} \n", groups.join(" ")),
                "{engine}, {user}: {answer}"
            );
        }
        server.stop();
    }
}
