//! coderunner itself: started, asked over HTTP, stopped.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::contenders::{Contender, check};
use crate::http::{Answer, Connection};
use crate::jobs::Job;
use crate::load::Client;
use crate::processes::memory;
use crate::sandboxes::{self, wait_until_full};

/// The engines that coderunner has, as `--engine` takes them.
pub const ENGINES: [&str; 2] = ["podman", "direct"];

/// Containers of each server: the default of the settings.
const CONTAINERS: usize = 10;

/// Longest that a start, and an end, may take.
const START_TIME: Duration = Duration::from_secs(60);
const STOP_TIME: Duration = Duration::from_secs(60);

/// Pause between two looks at what changes soon.
const LOOK: Duration = Duration::from_millis(2);

/// An executable of ours.
pub struct Build {
    /// Its name in the table.
    pub name: &'static str,
    pub path: PathBuf,
}

/// A server for one job, its default language.
pub struct Server {
    name: String,
    instance: String,
    address: SocketAddr,
    child: Child,
    /// From its start to the first answer of a program that it ran.
    pub first_answer: Duration,
    dir: TempDir,
}

impl Server {
    /// Starts one and waits for its first answer and a full pool.
    pub fn start(build: &Build, engine: &str, job: &Job) -> Result<Server> {
        let dir = TempDir::new()?;
        let instance = format!("{}{}-{}-{engine}", build.name, std::process::id(), job.name);
        // Free now; what takes it in between is told by the server.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        // Its name is on the server's command line, by which its processes are found.
        let config = dir.path().join(format!("{instance}.toml"));
        let text = format!(
            "listen = \"{address}\"\ninstance = \"{instance}\"\nlanguages = [\"{}\"]\ncontainers = {CONTAINERS}\n{}",
            job.name,
            job.language()
        );
        std::fs::write(&config, text)?;
        let log = File::create(dir.path().join("log"))?;
        let mut command = Command::new("setpriv");
        // However the bench ends, the server ends with it, in order.
        command.args(["--pdeathsig", "TERM", "--"]).arg(&build.path);
        command.args(["serve", "--engine", engine, "--config"]).arg(&config);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CODERUNNER_")) {
            command.env_remove(variable);
        }
        command.env("XDG_STATE_HOME", dir.path()).env("NO_COLOR", "1");
        let start = Instant::now();
        let child = command.spawn().context("cannot start setpriv: install Debian's package util-linux")?;
        let mut server = Server {
            name: format!("{}, {engine}", build.name),
            instance,
            address,
            child,
            first_answer: Duration::ZERO,
            dir,
        };
        server.wait_for_answer(job, start)?;
        server.settle()?;
        Ok(server)
    }

    fn wait_for_answer(&mut self, job: &Job, start: Instant) -> Result<()> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("the server ended at its start with {status}:\n{}", self.log());
            }
            let answered = match Connection::open(self.address).and_then(|mut to| to.post(&job.code())) {
                Ok(answer) if answer.status != 503 => Some(answer),
                // Not listening yet, or no image or sandbox yet.
                _ => None,
            };
            if let Some(answer) = answered {
                self.first_answer = start.elapsed();
                return self.verify(&answer);
            }
            ensure!(start.elapsed() < START_TIME, "no answer after {START_TIME:?}:\n{}", self.log());
            std::thread::sleep(LOOK);
        }
    }

    /// A connection to it.
    pub fn connect(&self) -> Result<Connection> {
        Connection::open(self.address)
    }

    /// Its address, for what is measured beside runs.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Refuses any answer but that of the job.
    pub fn verify(&self, answer: &Answer) -> Result<()> {
        let text = || String::from_utf8_lossy(&answer.body).into_owned();
        ensure!(answer.status == 200, "{}: status {}: {}\n{}", self.name, answer.status, text(), self.log());
        let fields: Value = serde_json::from_slice(&answer.body)?;
        ensure!(fields["status"] == 1, "{}: it did not compile: {}", self.name, text());
        check(&self.name, fields["runOutput"].as_str().unwrap_or_default())
    }

    /// Memory of the server in bytes.
    pub fn memory(&self) -> Result<u64> {
        memory(self.child.id(), "status", "VmRSS:")
    }

    /// Memory of an idle sandbox in bytes, with all that is there for its sake.
    pub fn memory_per_sandbox(&self) -> Result<u64> {
        let look = || {
            self.settle()?;
            sandboxes::memory_per_sandbox(&self.instance, self.child.id())
        };
        // A process of something periodic may end under our eyes.
        look().or_else(|_| look())
    }

    /// File descriptors that it has open.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))?.count())
    }

    /// Ends it by SIGTERM; anything but exit code 0 is an error.
    pub fn stop(mut self) -> Result<()> {
        let status = self.end()?;
        ensure!(status.success(), "the server ended with {status}:\n{}", self.log());
        Ok(())
    }

    fn end(&mut self) -> Result<ExitStatus> {
        let start = Instant::now();
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > STOP_TIME {
                self.child.kill()?;
                self.child.wait()?;
                bail!("the server did not end within {STOP_TIME:?}:\n{}", self.log());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// The end of its log.
    fn log(&self) -> String {
        let path: PathBuf = self.dir.path().join("log");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// The names that it gave its images, which no later instance uses.
    fn forget_images(&self) {
        let hash = blake3::hash(self.instance.as_bytes()).to_hex();
        let ours = format!("localhost/coderunner-current:{}-", &hash[..12]);
        let listed = Command::new("podman").args(["images", "--format", "{{.Repository}}:{{.Tag}}"]).output();
        let names = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        for name in names.lines().filter(|name| name.starts_with(&ours)) {
            let _ = Command::new("podman").args(["untag", name, name]).stdout(Stdio::null()).status();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing to do after stop(); in all other cases there is an error already.
        let _ = self.end();
        self.forget_images();
    }
}

impl Contender for Server {
    fn name(&self) -> &str {
        &self.name
    }

    fn client<'a>(&'a self, job: &'a Job) -> Result<Client<'a>> {
        let mut connection = self.connect()?;
        Ok(Box::new(move || self.verify(&connection.post(&job.code())?)))
    }

    fn settle(&self) -> Result<Instant> {
        wait_until_full(&self.instance, CONTAINERS)
    }

    fn made_ahead(&self) -> usize {
        CONTAINERS
    }

    fn runs_here(&self) -> bool {
        false
    }
}
