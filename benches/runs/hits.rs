//! Answers from the cache, compared with a warp handler that only sends the same answer.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use warp::Filter;

use crate::contenders::Contender;
use crate::http::Connection;
use crate::jobs::{JOBS, OUTPUT};
use crate::load::{Client, Load, Until, percentile, run_load};
use crate::server::Server;

/// Clients at once.
const CLIENTS: usize = 4;

/// Number and length of the slices of each server.
const ROUNDS: usize = 5;
const SLICE: Duration = Duration::from_millis(400);

/// The flag that makes this executable serve the bare handler.
pub const BARE_WARP: &str = "--bare-warp";

/// The result for one server.
#[derive(Debug, Clone, Serialize)]
pub struct Hits {
    /// Name of the server.
    pub server: String,
    /// Median latency.
    pub p50_ms: f64,
    /// Throughput.
    pub per_s: f64,
}

/// The request.
#[derive(Deserialize)]
struct Request {
    #[serde(rename = "code")]
    _code: String,
}

/// The answer, in coderunner's format.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    status: u8,
    compile_output: &'static str,
    run_output: &'static str,
}

/// Measures all servers in turn, the bare handler last.
pub fn measure(servers: &[Server]) -> Result<Vec<Hits>> {
    let code = JOBS[0].code();
    let bare = BareWarp::start()?;
    let expected = Connection::open(bare.address)?.post(&code)?;
    for server in servers {
        let first = server.connect()?.post(&code)?;
        server.verify(&first)?;
        ensure!(expected.body == first.body, "the bare handler answers {:?}", String::from_utf8_lossy(&expected.body));
    }
    let ours = servers.iter().map(|server| (server.name().to_owned(), server.address()));
    let all: Vec<(String, SocketAddr)> = ours.chain([("bare warp handler".to_owned(), bare.address)]).collect();
    let mut loads: Vec<Load> = all.iter().map(|_| Load::default()).collect();
    for _ in 0..ROUNDS {
        for (load, (_, address)) in loads.iter_mut().zip(&all) {
            let clients: Result<Vec<Client>> = (0..CLIENTS).map(|_| client(*address, &code)).collect();
            let slice = run_load(clients?, 0, Until::Elapsed(SLICE))?;
            load.latencies.extend(slice.latencies);
            load.elapsed += slice.elapsed;
        }
    }
    let hits = |((server, _), load): (&(String, SocketAddr), &Load)| Hits {
        server: server.clone(),
        p50_ms: percentile(&load.latencies, 0.5),
        per_s: load.latencies.len() as f64 / load.elapsed.as_secs_f64(),
    };
    Ok(all.iter().zip(&loads).map(hits).collect())
}

fn client(address: SocketAddr, code: &str) -> Result<Client<'_>> {
    let mut connection = Connection::open(address)?;
    Ok(Box::new(move || {
        let status = connection.post(code)?.status;
        ensure!(status == 200, "status {status}");
        Ok(())
    }))
}

/// The bare handler in its own process, like the server.
struct BareWarp {
    child: Child,
    address: SocketAddr,
}

impl BareWarp {
    fn start() -> Result<BareWarp> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(std::env::current_exe()?).arg(BARE_WARP);
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("no stdout")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let address = line.trim().parse().with_context(|| format!("the bare handler printed {line:?}"))?;
        Ok(BareWarp { child, address })
    }
}

impl Drop for BareWarp {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves the bare handler until the process is killed.
pub fn serve_bare() -> Result<()> {
    let routes = warp::path!("coderunner")
        .and(warp::post())
        .and(warp::body::json())
        .map(|_: Request| warp::reply::json(&Response { status: 1, compile_output: "", run_output: OUTPUT }));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        println!("{}", listener.local_addr()?);
        warp::serve(routes).incoming(listener).run().await;
        Ok(())
    })
}
