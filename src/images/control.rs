//! Orders to a running server: a socket in its runtime directory, which only its user can reach.
//!
//! There is one order, `update`. The answer is a line per image, and `failed` or `done` at the end.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::host::print;
use crate::images::Order;
use crate::images::report::{self, Report};

/// How long who connects may take to say what it wants.
const ORDER_TIME: Duration = Duration::from_secs(5);

/// Takes orders until `stop`.
pub async fn serve(listener: UnixListener, updates: mpsc::Sender<Order>, stop: CancellationToken) {
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match stream {
            Ok((stream, _)) => {
                let updates = updates.clone();
                let stop = stop.clone();
                tokio::spawn(async move {
                    tokio::select! {
                        _ = answer(stream, updates) => {}
                        () = stop.cancelled() => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the control socket");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn answer(mut stream: UnixStream, updates: mpsc::Sender<Order>) -> std::io::Result<()> {
    let mut order = [0; 7];
    tokio::time::timeout(ORDER_TIME, stream.read_exact(&mut order)).await??;
    if &order != b"update\n" {
        return stream.write_all(b"the only order is update\nfailed\n").await;
    }
    let (reply, reports) = oneshot::channel();
    let asked = updates.send(reply).await.is_ok();
    let (text, ok) = match reports.await {
        Ok(reports) if asked => summary(&reports),
        _ => ("given up: the configuration was reloaded, or the server is shutting down\n".to_owned(), false),
    };
    let end = if ok { "done\n" } else { "failed\n" };
    stream.write_all((text + end).as_bytes()).await
}

/// The lines of some reports, and whether all went well.
pub fn summary(reports: &[Report]) -> (String, bool) {
    let text = reports.iter().map(|report| report::line(report) + "\n").collect();
    (text, report::all_well(reports))
}

/// Has the server behind this socket update its images; prints its answer. `None` where no server listens.
pub async fn update(socket: &Path) -> anyhow::Result<Option<bool>> {
    let cannot = || format!("cannot order on {}", socket.display());
    let mut stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(error).with_context(cannot),
    };
    stream.write_all(b"update\n").await.with_context(cannot)?;
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next_line().await.with_context(cannot)? {
        match line.as_str() {
            "done" => return Ok(Some(true)),
            "failed" => return Ok(Some(false)),
            line => print::stdout(format!("{line}\n"))?,
        }
    }
    bail!("{}: the server ended in the middle of its answer", cannot())
}
