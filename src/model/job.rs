//! A job: one program to compile and run, with its files, input and limits.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::model::limits::{Limits, StageMemory};

/// Bytes of a page: a tmpfs allocates memory to files in whole pages.
const PAGE: usize = 4096;

/// One program to compile and run.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Name of the language in the catalogue.
    pub language: String,
    /// Source files from the client, then the files that the language adds.
    pub files: Arc<[SourceFile]>,
    /// Standard input of the run stage.
    pub stdin: Bytes,
    /// Arguments appended to the language's run command.
    pub args: Arc<[String]>,
    /// Whether stdout and stderr share one pipe.
    pub streams: Streams,
    /// Limits of this job: the language's, or lower ones that the client asked for.
    pub limits: Limits,
    /// Memory limits of single stages, where the client asked for less than the container has.
    pub memory: StageMemory,
}

impl Job {
    /// Checks that the files fit within the disk and inode limits. The error is a message for the client.
    pub fn has_room(&self) -> Result<(), String> {
        let names = || self.files.iter().map(|file| file.name.as_str());
        let parents: BTreeSet<&str> =
            names().flat_map(|name| name.match_indices('/').map(|(at, _)| &name[..at])).collect();
        // The working directory takes an inode too.
        let inodes = (self.files.len() + parents.len() + 1) as u64;
        let bytes: usize = self.files.iter().map(|file| file.content.len().next_multiple_of(PAGE)).sum();
        if inodes > self.limits.inodes {
            let max = self.limits.inodes;
            return Err(format!("the files are {inodes} with their directories, and at most {max} are allowed"));
        }
        if bytes as u64 > self.limits.directory_size() {
            let max = self.limits.directory_size();
            return Err(format!("the files take {bytes} bytes of a disk of {max}"));
        }
        Ok(())
    }
}

/// One file of a job, placed in the working directory before the first stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Relative path without `..`; the code that builds the job has checked it.
    pub name: String,
    /// Contents, byte for byte.
    pub content: Bytes,
}

/// How the server reads the two output streams of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Streams {
    /// One pipe for both: the order is exact, and everything counts as stdout.
    Merged,
    /// A pipe each: the streams stay apart, and their relative order is that of arrival.
    Separate,
}

/// The two stages of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Compiles the source to the artifact.
    Compile,
    /// Runs the program.
    Run,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn job(code: &[u8]) -> Job {
        let language = crate::config::tests::language("c");
        language.job(Bytes::copy_from_slice(code), Streams::Merged)
    }

    #[test]
    fn disk_and_inode_limits_are_checked_as_the_kernel_counts() {
        let with = |names: &[&str], inodes, length: usize| {
            let file = |name: &&str| SourceFile { name: (*name).into(), content: vec![b'x'; length].into() };
            let mut job = Job { files: names.iter().map(file).collect(), ..job(b"") };
            job.limits.inodes = inodes;
            job.limits.disk = bytesize::ByteSize::kib(8);
            job.has_room()
        };
        assert!(with(&["a", "b"], 3, 0).is_ok() && with(&["a", "b"], 2, 0).is_err());
        assert!(with(&["a/b/c", "a/b/d"], 5, 0).is_ok() && with(&["a/b/c", "a/b/d"], 4, 0).is_err());
        assert!(with(&["a", "b"], 9, 1).is_ok() && with(&["a", "b", "c"], 9, 1).is_err());
        assert!(with(&["a"], 9, 8192).is_ok() && with(&["a"], 9, 8193).is_err());
    }
}
