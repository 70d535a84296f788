//! The jobs that every contender runs, each time with a new source.

use std::sync::atomic::{AtomicU64, Ordering};

/// The output of every job.
pub const OUTPUT: &str = "hello\n";

/// A program, and the commands that compile and run it.
pub struct Job {
    /// Its name in the table, and the name of the language in the server's configuration.
    pub name: &'static str,
    /// The image, which packaging/images/build makes.
    pub image: &'static str,
    /// Name of the source file.
    pub source: &'static str,
    /// Argument vector of the compiler; empty if there is none.
    pub compile: &'static [&'static str],
    /// Argument vector of the program.
    pub run: &'static [&'static str],
    program: &'static str,
    comment: &'static str,
}

const C: &str = "#include <stdio.h>\nint main(void) { puts(\"hello\"); return 0; }\n";

/// All jobs, in the order of the tables.
pub const JOBS: [Job; 3] = [
    Job {
        name: "sh",
        image: "localhost/coderunner-bash:latest",
        source: "main.sh",
        compile: &[],
        run: &["busybox", "sh", "main.sh"],
        program: "echo hello\n",
        comment: "#",
    },
    Job {
        name: "tcc",
        image: "localhost/coderunner-c:latest",
        source: "main.c",
        compile: &["tcc", "-o", "out", "main.c", "-lm"],
        run: &["./out"],
        program: C,
        comment: "//",
    },
    Job {
        name: "gcc",
        image: "localhost/coderunner-gcc:latest",
        source: "main.c",
        compile: &["gcc", "-O1", "-o", "out", "main.c", "-lm"],
        run: &["./out"],
        program: C,
        comment: "//",
    },
];

impl Job {
    /// A new source, so that no answer comes from a cache.
    pub fn code(&self) -> String {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        format!("{}{} {number}\n", self.program, self.comment)
    }

    /// A single command that compiles and runs, for contenders that start one process per run.
    pub fn command(&self) -> Vec<String> {
        match self.compile {
            [] => self.run.iter().map(|&arg| arg.into()).collect(),
            compile => {
                let script = format!("{} && exec {}", compile.join(" "), self.run.join(" "));
                ["busybox", "sh", "-c", &script].map(str::to_owned).into()
            }
        }
    }

    /// The job as a language in the server's configuration.
    pub fn language(&self) -> String {
        let artifact = match self.compile {
            [] => "",
            _ => "artifact = \"out\"\n",
        };
        format!(
            "[language.{}]\nimage = {:?}\nsource = {:?}\ncompile = {:?}\n{artifact}run = {:?}\n\
             health = {{ code = {:?}, output = {OUTPUT:?} }}\n",
            self.name, self.image, self.source, self.compile, self.run, self.program
        )
    }
}
