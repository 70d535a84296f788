//! The cache key of a job.

use crate::model::job::{Job, Streams};
use crate::model::limits::Limits;

/// A cache key: a hash of everything that can change the outcome of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct JobKey([u8; 32]);

impl Job {
    /// The cache key of this job on an image. `image` is the content id, not the name.
    pub fn key(&self, image: &str) -> JobKey {
        // Collected first and hashed at once: hashing piece by piece takes longer than the rest of a cache hit.
        let mut text = Vec::with_capacity(512);
        // Each field is preceded by its length, so that different jobs never give the same bytes.
        let mut add = |bytes: &[u8]| {
            text.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            text.extend_from_slice(bytes);
        };
        add(self.language.as_bytes());
        add(image.as_bytes());
        add(&(self.files.len() as u64).to_le_bytes());
        for file in self.files.iter() {
            add(file.name.as_bytes());
            add(&file.content);
        }
        add(&self.stdin);
        add(&(self.args.len() as u64).to_le_bytes());
        for arg in self.args.iter() {
            add(arg.as_bytes());
        }
        add(&[matches!(self.streams, Streams::Merged).into()]);
        add(self.limits.numbers().map(u128::to_le_bytes).as_flattened());
        for limit in [self.memory.compile, self.memory.run] {
            add(limit.map(u64::to_le_bytes).as_ref().map_or(&[], |bytes| bytes));
        }
        JobKey(*blake3::hash(&text).as_bytes())
    }
}

impl Limits {
    /// All limits as numbers, in a fixed order.
    fn numbers(&self) -> [u128; 12] {
        // Without `..`, so that adding a limit without hashing it does not compile.
        let Limits {
            memory,
            processes,
            cpus,
            open_files,
            disk,
            inodes,
            output,
            output_total,
            compile_time,
            compile_cpu_time,
            run_time,
            run_cpu_time,
        } = self;
        [
            memory.as_u64().into(),
            (*processes).into(),
            cpus.to_bits().into(),
            (*open_files).into(),
            disk.as_u64().into(),
            (*inodes).into(),
            output.as_u64().into(),
            output_total.as_u64().into(),
            compile_time.as_nanos(),
            compile_cpu_time.as_nanos(),
            run_time.as_nanos(),
            run_cpu_time.as_nanos(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;
    use std::time::Duration;

    use bytesize::ByteSize;
    use proptest::prelude::*;

    use super::*;
    use crate::model::job::tests::job;
    use crate::model::limits::StageMemory;

    proptest! {
        #[test]
        fn job_keys_differ_exactly_if_inputs_differ(
            a in (any::<String>(), any::<Vec<u8>>(), proptest::collection::vec(any::<String>(), 0..3), "[ab]{0,3}"),
            b in (any::<String>(), any::<Vec<u8>>(), proptest::collection::vec(any::<String>(), 0..3), "[ab]{0,3}"),
        ) {
            let key = |(code, stdin, args, image): &(String, Vec<u8>, Vec<String>, String)| {
                let job = Job { stdin: stdin.clone().into(), args: args.clone().into(), ..job(code.as_bytes()) };
                job.key(image)
            };
            prop_assert_eq!(key(&a) == key(&b), a == b);
            prop_assert_eq!(key(&a), key(&a));
        }
    }

    #[test]
    fn each_changed_field_changes_the_job_key() {
        let base = job(b"x");
        let mut others = vec![job(b"y")];
        others.push(Job { language: "d".into(), ..base.clone() });
        others.push(Job { stdin: "x".into(), ..base.clone() });
        others.push(Job { args: vec!["x".into()].into(), ..base.clone() });
        others.push(Job { args: vec![String::new()].into(), ..base.clone() });
        others.push(Job { streams: Streams::Separate, ..base.clone() });
        let limits = |change: &dyn Fn(&mut Limits)| {
            let mut job = base.clone();
            change(&mut job.limits);
            job
        };
        others.push(Job { memory: StageMemory { compile: Some(1), run: None }, ..base.clone() });
        others.push(Job { memory: StageMemory { compile: None, run: Some(1) }, ..base.clone() });
        others.push(limits(&|l| l.run_time += Duration::from_nanos(1)));
        others.push(limits(&|l| l.memory = ByteSize(l.memory.as_u64() + 1)));
        others.push(limits(&|l| l.cpus += 0.001));
        others.push(limits(&|l| l.output = ByteSize(l.output.as_u64() + 1)));
        let mut renamed = base.clone();
        Arc::make_mut(&mut renamed.files)[0].name = "other.c".into();
        others.push(renamed);
        let mut keys: Vec<JobKey> = others.iter().map(|job| job.key("image")).collect();
        keys.push(base.key("image"));
        keys.push(base.key("another image"));
        let distinct: HashSet<&JobKey> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
    }
}
