//! Reads headers whose value is a comma-separated list.

use warp::http::{HeaderMap, HeaderName};

/// The items of a header with a list, in all its lines. Lines that are not text are left out.
pub fn list_items(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let lines = headers.get_all(name).into_iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim)
}
