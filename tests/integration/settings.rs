//! Settings: their sources, the precedence of these, and the messages about invalid settings.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::Answer;
use crate::harness::{Files, Options, Server, eventually, output, refused, refused_with};
use crate::leftovers;

/// Runs `coderunner config` on a configuration file. Returns the settings in effect, or exit code and message.
fn settings(text: &str, env: &[(&str, &str)], flags: &[&str]) -> Result<toml::Table, (i32, String)> {
    let options = Options { env, ..Options::default() };
    let files = Files::new(&options);
    fs::write(files.config(), text).unwrap();
    print_settings(&files, &options, flags)
}

fn print_settings(files: &Files, options: &Options, flags: &[&str]) -> Result<toml::Table, (i32, String)> {
    let output = output(files.command("config", options).args(flags), b"");
    let stderr = String::from_utf8(output.stderr).unwrap();
    match output.status.code() {
        Some(0) => Ok(String::from_utf8(output.stdout).unwrap().parse().unwrap()),
        code => Err((code.expect("killed by a signal"), stderr)),
    }
}

#[track_caller]
fn assert_refused(refused: Result<toml::Table, (i32, String)>, words: &[&str]) {
    let (code, message) = refused.expect_err("no refusal");
    assert_eq!(code, 1, "{message}");
    assert!(message.starts_with("coderunner: "), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    for word in words {
        assert!(message.contains(word), "no {word:?}: {message}");
    }
}

#[test]
fn configuration_errors_name_key_value_and_what_is_allowed() {
    for (text, words) in [
        // Unknown keys; the message lists the known ones.
        ("containres = 3", &["containres", "containers"][..]),
        ("[cache]\nttll = \"1m\"", &["cache.ttll", "ttl"]),
        ("[language.c]\nimages = \"x\"", &["language.c.images", "image"]),
        ("[language.c.limits]\nmemry = 1", &["language.c.limits", "memry", "memory"]),
        // Values of the wrong type.
        ("containers = \"many\"", &["containers", "many", "number"]),
        ("containers = -1", &["containers", "-1", "number"]),
        ("listen = \"nowhere\"", &["listen", "nowhere", "127.0.0.1:8080"]),
        ("require_limits = \"yes\"", &["require_limits", "yes", "boolean"]),
        ("languages = \"c\"", &["languages", "list"]),
        ("[cache]\nttl = \"soon\"", &["cache.ttl", "soon", "10s"]),
        ("[limits]\nmemory = \"lots\"", &["limits.memory", "lots", "MiB"]),
        ("[limits]\ncpus = \"one\"", &["limits.cpus", "one", "number"]),
        ("engine = \"docker\"", &["engine", "docker", "podman"]),
        // Values out of their range.
        ("containers = 0", &["containers", "0", "from 1 to 150"]),
        ("source_limit = \"1MiB\"", &["source_limit", "1MiB", "512KiB, body_limit"]),
        ("[queue]\nwait = \"2h\"", &["queue.wait", "2h", "1h"]),
        ("[limits]\nrun_time = \"1h\"", &["limits.run_time", "3600", "300", "ceilings"]),
        ("[language.python.limits]\nmemory = \"1KiB\"", &["language.python.limits.memory", "1024", "16777216"]),
        ("[ceilings]\nmemory = \"64MiB\"", &["limits.memory", "536870912", "67108864"]),
        ("languages = []", &["languages", "[]", "at least one"]),
        ("cors_origins = [\"example.org\"]", &["cors_origins", "example.org", "https://"]),
        ("instance = \"../x\"", &["instance", "../x", "a-z"]),
        // Languages.
        ("languages = [\"cobol\"]", &["languages", "cobol", "python", "rust"]),
        ("[language.cobol]\nimage = \"x\"", &["language.cobol", "missing", "source"]),
        ("[language.c]\nimage = \"--privileged\"", &["language.c.image", "--privileged", "docker.io"]),
        ("[language.c]\nsource = \"../main.c\"", &["language.c", "../main.c", "relative"]),
        // Invalid TOML.
        ("this is no toml", &["coderunner.toml", "expected"]),
        ("containers = 1\ncontainers = 2", &["coderunner.toml", "duplicate"]),
    ] {
        println!("{text}");
        assert_refused(settings(text, &[], &[]), words);
    }
}

#[test]
fn errors_name_invalid_environment_variables() {
    for (name, value, words) in [
        ("CODERUNNER_CONTAINERS", "zero", &["zero", "number"][..]),
        ("CODERUNNER_CACHE_TTL", "soon", &["soon", "10s"]),
        ("CODERUNNER_LIMITS_MEMORY", "lots", &["lots", "MiB"]),
        ("CODERUNNER_FOO", "1", &["no such key", "containers"]),
        ("CODERUNNER_LOG", "loud=very", &["loud=very", "debug"]),
    ] {
        let refused = settings("", &[(name, value)], &[]);
        assert_refused(refused.clone(), &[name]);
        assert_refused(refused, words);
    }
    assert_refused(settings("", &[("CODERUNNER_CONTAINERS", "0")], &[]), &["containers", "0", "from 1 to 150"]);
}

#[test]
fn test_environment_variables_are_not_settings() {
    settings("", &[("CODERUNNER_TEST_KILLS", "100")], &[]).unwrap();
}

#[test]
fn invalid_flags_are_usage_errors() {
    let options = Options::default();
    let files = Files::new(&options);
    for (flags, words) in [
        (&["--listen", "nowhere"][..], &["nowhere", "--listen"][..]),
        (&["--listen", "127.0.0.1:99999"], &["99999", "--listen"]),
        (&["--engine", "docker"], &["docker", "--engine", "podman"]),
        (&["--frobnicate"], &["--frobnicate", "Usage"]),
        (&["file.c"], &["file.c", "Usage"]),
    ] {
        let output = output(files.command("serve", &options).args(flags), b"");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {stderr}");
        assert!(words.iter().all(|word| stderr.contains(word)), "{flags:?}: {stderr}");
    }
    assert_refused(settings("", &[], &["--language", "cobol"]), &["cobol", "python"]);
}

#[test]
fn unreadable_configuration_files_are_refused() {
    let options = Options::default();
    let files = Files::new(&options);
    let config = files.config();
    let name = config.to_str().unwrap();
    fs::set_permissions(&config, fs::Permissions::from_mode(0o000)).unwrap();
    assert_refused(print_settings(&files, &options, &[]), &[name, "Permission denied"]);
    fs::remove_file(&config).unwrap();
    assert_refused(print_settings(&files, &options, &[]), &[name, "No such file"]);
    fs::create_dir(&config).unwrap();
    assert_refused(print_settings(&files, &options, &[]), &[name, "directory"]);
    fs::remove_dir(&config).unwrap();
    fs::write(&config, b"listen = \"\xff\"").unwrap();
    assert_refused(print_settings(&files, &options, &[]), &[name, "UTF-8"]);
}

#[test]
fn server_with_invalid_settings_does_not_start() {
    let exit = refused(Options { config: "containers = 0", ..Options::default() });
    assert_eq!(exit.status.code(), Some(1), "{exit}");
    assert!(exit.stderr.contains("from 1 to 150"), "{exit}");

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let exit = refused(Options { config: &format!("listen = \"{address}\""), ..Options::default() });
    assert_eq!(exit.status.code(), Some(1), "{exit}");
    assert!(exit.stderr.contains(&address) && exit.stderr.contains("in use"), "{exit}");
}

#[test]
fn precedence_is_defaults_then_file_then_environment_then_flags() {
    let of = |text: &str, env: &[(&str, &str)], flags: &[&str]| settings(text, env, flags).unwrap();
    let languages = |settings: &toml::Table| settings["languages"].to_string();
    let (file, variable) = ("languages = [\"python\"]", ("CODERUNNER_LANGUAGES", "[\"go\"]"));
    assert_eq!(languages(&of("", &[], &[])), "[\"pivot\"]");
    assert_eq!(languages(&of(file, &[], &[])), "[\"python\"]");
    assert_eq!(languages(&of(file, &[variable], &[])), "[\"go\"]");
    let flags = ["--language", "bash", "--language", "c"];
    assert_eq!(languages(&of(file, &[variable], &flags)), "[\"bash\", \"c\"]");

    // Layers are merged key by key.
    let settings = of("[cache]\nttl = \"1m\"\nsize = \"1MiB\"", &[("CODERUNNER_CACHE_TTL", "2m")], &[]);
    assert_eq!(settings["cache"]["ttl"].as_str(), Some("2m"));
    assert_eq!(settings["cache"]["size"].as_str(), Some("1MiB"));
    assert_eq!(settings["containers"].as_integer(), Some(10));
}

#[test]
fn listen_flag_sets_the_address() {
    // The address of the variable cannot be used: no host has 192.0.2.1.
    let env = [("CODERUNNER_LISTEN", "192.0.2.1:80")];
    let options = Options { env: &env, ..Options::default() };
    let files = Files::new(&options);
    let exit = refused_with(&files, &options);
    assert_eq!(exit.status.code(), Some(1), "{exit}");
    assert!(exit.stderr.contains("cannot listen on 192.0.2.1:80"), "{exit}");
    let mut child = files.command("serve", &options);
    let mut child = child.args(["--listen", "127.0.0.1:0"]).stderr(Stdio::null()).spawn().unwrap();
    let control = leftovers::runtime_dir(&files.instance).join("control");
    eventually("the server listens", || {
        assert!(child.try_wait().unwrap().is_none(), "the server exited");
        control.exists().then_some(())
    });
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    let status = eventually("the server exits", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    leftovers::assert_none(&files.instance);
}

#[test]
fn reload_changes_default_language_and_container_count() {
    let server = Server::start(Options { languages: &["bash"], containers: 1, ..Options::default() });
    assert_eq!(server.run("echo bash"), Answer::ran("bash\n"));
    let config = server.files().config();
    let text = fs::read_to_string(&config).unwrap();
    let address = server.address.to_string();
    let new = text
        .replace("languages = [\"bash\"]", "languages = [\"python\", \"bash\"]")
        .replace("containers = 1", "containers = 3")
        .replace("127.0.0.1:0", "127.0.0.1:1");
    fs::write(&config, new).unwrap();
    server.signal(Signal::SIGHUP);
    server.wait_log(&["configuration reloaded", "python bash"]);
    server.wait_log(&["WARN", "listen", "restart"]);
    server.wait_ready();
    assert_eq!(server.run("print('python')"), Answer::ran("python\n"));
    assert_eq!(server.address.to_string(), address);
    eventually("there are three sandboxes", || (leftovers::sandboxes(&server.instance) == 3).then_some(()));

    let mut fewer: toml::Table = fs::read_to_string(&config).unwrap().parse().unwrap();
    fewer.insert("containers".into(), 1.into());
    fs::write(&config, fewer.to_string()).unwrap();
    server.signal(Signal::SIGHUP);
    eventually("there is one sandbox", || (leftovers::sandboxes(&server.instance) == 1).then_some(()));
    assert_eq!(server.run("print('still')"), Answer::ran("still\n"));
    server.stop();
}
