//! The control socket: commands to a running server, on a socket in its runtime directory that only its user can reach.
//!
//! The only command is `update`. The response is a line per image, then `failed` or `done`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::host::print;
use crate::images::UpdateRequest;
use crate::images::report::{self, Report};

/// How long a client may take to send its command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves the control socket until `stop`.
pub async fn serve(listener: UnixListener, updates: mpsc::Sender<UpdateRequest>, stop: CancellationToken) {
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
                        _ = handle(stream, updates) => {}
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

async fn handle(mut stream: UnixStream, updates: mpsc::Sender<UpdateRequest>) -> std::io::Result<()> {
    let mut command = [0; 7];
    tokio::time::timeout(COMMAND_TIMEOUT, stream.read_exact(&mut command)).await??;
    if &command != b"update\n" {
        return stream.write_all(b"the only command is update\nfailed\n").await;
    }
    let (reply, reports) = oneshot::channel();
    let sent = updates.send(reply).await.is_ok();
    let (text, ok) = match reports.await {
        Ok(reports) if sent => summary(&reports),
        _ => ("update cancelled: the configuration was reloaded, or the server is shutting down\n".to_owned(), false),
    };
    let end = if ok { "done\n" } else { "failed\n" };
    stream.write_all((text + end).as_bytes()).await
}

/// The reports as lines of text, and whether no image failed.
pub fn summary(reports: &[Report]) -> (String, bool) {
    let text = reports.iter().map(|report| report::line(report) + "\n").collect();
    (text, report::all_succeeded(reports))
}

/// Asks the server on this socket to update its images and prints its response. Returns whether no image failed, or
/// `None` if no server listens.
pub async fn update(socket: &Path) -> anyhow::Result<Option<bool>> {
    let cannot = || format!("cannot use the control socket {}", socket.display());
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
    bail!("{}: the server closed the connection before its response was complete", cannot())
}
