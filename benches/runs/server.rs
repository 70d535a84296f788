//! coderunner as a contender: starts a server, calls it over HTTP, and stops it.

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

/// Containers of each server, as by default.
const CONTAINERS: usize = 10;

/// Timeouts of the start and the stop of a server.
const START_TIME: Duration = Duration::from_secs(60);
const STOP_TIME: Duration = Duration::from_secs(60);

/// Pause between two checks of a condition.
const POLL: Duration = Duration::from_millis(2);

/// An executable of coderunner.
pub struct Build {
    /// Its name in the table.
    pub name: &'static str,
    pub path: PathBuf,
}

/// A server whose default language runs one job.
pub struct Server {
    name: String,
    instance: String,
    address: SocketAddr,
    child: Child,
    /// The time from the start of the server to the first answer.
    pub first_answer: Duration,
    dir: TempDir,
}

impl Server {
    /// Starts a server, and waits for its first answer and a full pool.
    pub fn start(build: &Build, engine: &str, job: &Job) -> Result<Server> {
        let dir = TempDir::new()?;
        let instance = format!("{}{}-{}-{engine}", build.name, std::process::id(), job.name);
        // The address is free now. If another process takes it meanwhile, the server reports that.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        // The instance name is in this path, and so on the command line, by which the processes of the server are
        // found.
        let config = dir.path().join(format!("{instance}.toml"));
        let text = format!(
            "listen = \"{address}\"\ninstance = \"{instance}\"\nlanguages = [\"{}\"]\ncontainers = {CONTAINERS}\n{}",
            job.name,
            job.language()
        );
        std::fs::write(&config, text)?;
        let log = File::create(dir.path().join("log"))?;
        let mut command = Command::new("setpriv");
        // The server shuts down when the bench ends, even if the bench is killed.
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
                bail!("the server exited during startup with {status}:\n{}", self.log());
            }
            let answered = match Connection::open(self.address).and_then(|mut to| to.post(&job.code())) {
                Ok(answer) if answer.status != 503 => Some(answer),
                // The server does not listen yet, or has no image or sandbox yet.
                _ => None,
            };
            if let Some(answer) = answered {
                self.first_answer = start.elapsed();
                return self.verify(&answer);
            }
            ensure!(start.elapsed() < START_TIME, "no answer after {START_TIME:?}:\n{}", self.log());
            std::thread::sleep(POLL);
        }
    }

    /// Opens a connection to the server.
    pub fn connect(&self) -> Result<Connection> {
        Connection::open(self.address)
    }

    /// The address that the server listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Fails unless the answer is that of the job.
    pub fn verify(&self, answer: &Answer) -> Result<()> {
        let text = || String::from_utf8_lossy(&answer.body).into_owned();
        ensure!(answer.status == 200, "{}: status {}: {}\n{}", self.name, answer.status, text(), self.log());
        let fields: Value = serde_json::from_slice(&answer.body)?;
        ensure!(fields["status"] == 1, "{}: the job did not compile: {}", self.name, text());
        check(&self.name, fields["runOutput"].as_str().unwrap_or_default())
    }

    /// Memory of the server in bytes.
    pub fn memory(&self) -> Result<u64> {
        memory(self.child.id(), "status", "VmRSS:")
    }

    /// Memory of an idle sandbox in bytes, including all processes that exist for it.
    pub fn memory_per_sandbox(&self) -> Result<u64> {
        let look = || {
            self.settle()?;
            sandboxes::memory_per_sandbox(&self.instance, self.child.id())
        };
        // A short-lived process may end while its memory is read; a second attempt is enough.
        look().or_else(|_| look())
    }

    /// Number of open file descriptors of the server.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))?.count())
    }

    /// Stops the server with SIGTERM; an exit code other than 0 is an error.
    pub fn stop(mut self) -> Result<()> {
        let status = self.end()?;
        ensure!(status.success(), "the server exited with {status}:\n{}", self.log());
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
                bail!("the server did not exit within {STOP_TIME:?}:\n{}", self.log());
            }
            std::thread::sleep(POLL);
        }
    }

    /// The last lines of the log.
    fn log(&self) -> String {
        let path: PathBuf = self.dir.path().join("log");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Removes the names that the server gave its images, which no other instance uses.
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
        // The server has exited already if stop() was called. Otherwise an error is being reported, and this one is
        // ignored.
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

    fn pool_size(&self) -> usize {
        CONTAINERS
    }

    fn runs_here(&self) -> bool {
        false
    }
}
