//! Rules for system calls as a BPF program.
//!
//! The kernel runs the program at each call, and once for every call there is when it is installed. It finds the number by
//! halves, so both take a few steps, and looks at arguments only where a rule asks for it.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{BpfProgram, sock_filter};

/// By number of a system call.
pub type Rules = BTreeMap<u32, Rule>;

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// The kernel carries it out.
    Allow,
    /// It is not carried out and returns this error; 0 is success.
    Errno(i32),
    /// Init decides, and where it does not listen the call fails with ENOSYS.
    Ask,
}

/// What is decided about a system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rule {
    /// The same whatever its arguments.
    Always(Answer),
    /// Allowed where all checks of one of these lists hold, else this.
    Where(Vec<Vec<Check>>, Answer),
}

/// Whether half of an argument is one of some values. A filter sees registers, and nothing behind a pointer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Which argument, from 0.
    pub argument: u8,
    /// The upper half of its 64 bits, instead of the lower one.
    pub upper: bool,
    /// The bits that are looked at.
    pub mask: u32,
    /// What they may be.
    pub values: Vec<u32>,
    /// Holds where they are none of `values`.
    pub negated: bool,
}

impl Check {
    /// Whether an argument, which the kernel takes as 32 bits, is one of these.
    pub fn is(argument: u8, values: &[u32]) -> Check {
        Check { argument, upper: false, mask: u32::MAX, values: values.to_vec(), negated: false }
    }

    /// Whether an argument has none of these bits.
    pub fn without(argument: u8, bits: u32) -> Check {
        Check { argument, upper: false, mask: bits, values: vec![0], negated: false }
    }
}

/// The architecture that the kernel names in a call of this machine's own kind.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xC000_00B7;

/// Offsets in the kernel's `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Farthest that a branch goes: its distance has 8 bits, and a jump to either side may come between.
const NEAR: usize = 250;

/// Where a run of numbers leads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Answer(Answer),
    Place(Place),
}

/// A step, by how many there are from it to the end.
type Place = usize;

/// Makes the program. Numbers without a rule, those of x86-64's x32 ABI among them, get `otherwise`; a call of another
/// architecture, which has other numbers, ends the process.
pub fn compile(rules: &Rules, otherwise: Answer) -> BpfProgram {
    let mut program = Program::default();
    let mut runs = vec![(0, Target::Answer(otherwise))];
    let mut next = 0;
    for (&number, rule) in rules {
        let target = match rule {
            Rule::Always(answer) => Target::Answer(*answer),
            Rule::Where(lists, refused) => Target::Place(program.lists(lists, *refused)),
        };
        if number > next {
            begin(&mut runs, next, Target::Answer(otherwise));
        }
        begin(&mut runs, number, target);
        next = number + 1;
    }
    begin(&mut runs, next, Target::Answer(otherwise));

    let found = program.tree(&runs);
    program.go_to(found);
    let same = program.push(step(LOAD, 0, 0, NUMBER));
    let other = program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS));
    program.branch(EQUAL, ARCHITECTURE, same, other);
    program.push(step(LOAD, 0, 0, ARCH));
    program.steps.reverse();
    program.steps
}

/// From this number on it leads there.
fn begin(runs: &mut Vec<(u32, Target)>, number: u32, target: Target) {
    match runs.last_mut() {
        Some((start, last)) if *start == number => *last = target,
        Some((_, last)) if *last == target => {}
        _ => runs.push((number, target)),
    }
}

/// A program that is made from its end, for every jump goes towards that: so it is known how far.
#[derive(Default)]
struct Program {
    /// The last one first.
    steps: Vec<sock_filter>,
    /// Where each answer was given last. The kernel's compiler takes its time for each step, at each installation.
    answers: BTreeMap<Answer, Place>,
}

impl Program {
    /// Puts a step before the others.
    fn push(&mut self, step: sock_filter) -> Place {
        self.steps.push(step);
        self.steps.len()
    }

    /// How many steps a step that is put before the others skips to get there.
    fn distance(&self, to: Place) -> usize {
        self.steps.len() - to
    }

    /// Has what is put before the others lead there.
    fn go_to(&mut self, place: Place) -> Place {
        match self.distance(place) {
            0 => place,
            // No program of the kernel's has more than 4096 steps.
            distance => self.push(step(JUMP, 0, 0, distance as u32)),
        }
    }

    /// The place, or one that leads there and is near enough for a branch.
    fn near(&mut self, place: Place) -> Place {
        if self.distance(place) <= NEAR { place } else { self.go_to(place) }
    }

    fn branch(&mut self, code: u32, value: u32, yes: Place, no: Place) -> Place {
        let (yes, no) = (self.near(yes), self.near(no));
        let (yes, no) = (self.distance(yes) as u8, self.distance(no) as u8);
        self.push(step(code, yes, no, value))
    }

    /// A step near here that gives this answer.
    fn answer(&mut self, answer: Answer) -> Place {
        if let Some(&place) = self.answers.get(&answer)
            && self.distance(place) <= NEAR
        {
            return place;
        }
        let place = self.push(returns(answer));
        self.answers.insert(answer, place);
        place
    }

    /// Finds the run that a number is in.
    fn tree(&mut self, runs: &[(u32, Target)]) -> Place {
        if let [(_, target)] = runs {
            return match *target {
                Target::Answer(answer) => self.answer(answer),
                Target::Place(place) => place,
            };
        }
        let (lower, upper) = runs.split_at(runs.len() / 2);
        let start = upper[0].0;
        let upper = self.tree(upper);
        let lower = self.tree(lower);
        self.branch(AT_LEAST, start, upper, lower)
    }

    /// Allows where all checks of one list hold.
    fn lists(&mut self, lists: &[Vec<Check>], refused: Answer) -> Place {
        let mut otherwise = self.answer(refused);
        for list in lists.iter().rev() {
            let mut holds = self.answer(Answer::Allow);
            for check in list.iter().rev() {
                holds = self.check(check, holds, otherwise);
            }
            otherwise = holds;
        }
        otherwise
    }

    fn check(&mut self, check: &Check, holds: Place, otherwise: Place) -> Place {
        let (found, mut not_found) = if check.negated { (otherwise, holds) } else { (holds, otherwise) };
        for &value in check.values.iter().rev() {
            not_found = self.branch(EQUAL, value, found, not_found);
        }
        self.go_to(not_found);
        if check.mask != u32::MAX {
            self.push(step(AND, 0, 0, check.mask));
        }
        // The halves of a register lie as the machine, which is little-endian, has them in memory.
        self.push(step(LOAD, 0, 0, ARGUMENTS + u32::from(check.argument) * 8 + if check.upper { 4 } else { 0 }))
    }
}

fn returns(answer: Answer) -> sock_filter {
    let value = match answer {
        Answer::Allow => libc::SECCOMP_RET_ALLOW,
        Answer::Ask => libc::SECCOMP_RET_USER_NOTIF,
        Answer::Errno(errno) => libc::SECCOMP_RET_ERRNO | (errno.cast_unsigned() & libc::SECCOMP_RET_DATA),
    };
    step(RETURN, 0, 0, value)
}

fn step(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    // The codes are of 16 bits.
    sock_filter { code: code as u16, jt, jf, k }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// What a filter answers to a call of this machine with these arguments, as the kernel would run it.
    pub fn verdict(filter: &BpfProgram, call: u32, arguments: [u64; 6]) -> Answer {
        let (mut place, mut loaded) = (0, 0);
        loop {
            let step = &filter[place];
            place += 1;
            let operation = u32::from(step.code);
            match operation & 0x07 {
                libc::BPF_LD => {
                    loaded = match step.k {
                        NUMBER => call,
                        ARCH => ARCHITECTURE,
                        k => {
                            let at = k - ARGUMENTS;
                            (arguments[(at / 8) as usize] >> (at % 8 * 8)) as u32
                        }
                    }
                }
                libc::BPF_RET if step.k == libc::SECCOMP_RET_ALLOW => return Answer::Allow,
                libc::BPF_RET if step.k == libc::SECCOMP_RET_USER_NOTIF => return Answer::Ask,
                libc::BPF_RET => return Answer::Errno((step.k & libc::SECCOMP_RET_DATA).cast_signed()),
                libc::BPF_ALU => loaded &= step.k,
                libc::BPF_JMP => {
                    let yes = match operation & 0xf0 {
                        libc::BPF_JA => {
                            place += step.k as usize;
                            continue;
                        }
                        libc::BPF_JEQ => loaded == step.k,
                        libc::BPF_JGE => loaded >= step.k,
                        other => panic!("jumps by {other}"),
                    };
                    place += usize::from(if yes { step.jt } else { step.jf });
                }
                other => panic!("does {other}"),
            }
        }
    }

    #[test]
    fn each_number_gets_its_own_answer() {
        let only = |value| Rule::Where(vec![vec![Check::is(1, &[value])]], Answer::Errno(7));
        // Enough for jumps that are too far for one step.
        let rules: Rules = (0..600).filter(|n| n % 3 != 0).map(|n| (n, only(n))).collect();
        let filter = compile(&rules, Answer::Errno(38));
        for call in (0..700).chain([u32::MAX, 0x4000_0000, 0x4000_0001]) {
            for argument in [call, call ^ 1] {
                let expected = match rules.contains_key(&call) {
                    false => Answer::Errno(38),
                    true if argument == call => Answer::Allow,
                    true => Answer::Errno(7),
                };
                let argument = u64::from(argument) | 1 << 40;
                assert_eq!(verdict(&filter, call, [0, argument, 0, 0, 0, 0]), expected, "{call}({argument:#x})");
            }
        }
    }

    #[test]
    fn one_list_of_checks_has_to_hold() {
        let upper = Check { upper: true, ..Check::is(0, &[1, 2]) };
        let not = Check { negated: true, ..Check::is(1, &[3, 4]) };
        let lists = vec![vec![upper, Check::without(0, 0xf0)], vec![not, Check::is(2, &[9])]];
        let rules = Rules::from([(5, Rule::Where(lists, Answer::Errno(1)))]);
        let filter = compile(&rules, Answer::Errno(38));
        for (first, second, third, allowed) in [
            (0x1_0000_0000, 3, 0, true),
            (0x2_0000_000f, 3, 0, true),
            (0x1_0000_0010, 3, 0, false),
            (0x3_0000_0000, 3, 9, false),
            (0, 5, 9, true),
            (0, 4, 9, false),
            (0, 5, 8, false),
        ] {
            let expected = if allowed { Answer::Allow } else { Answer::Errno(1) };
            assert_eq!(verdict(&filter, 5, [first, second, third, 0, 0, 0]), expected, "{first:#x} {second} {third}");
        }
    }

    #[test]
    fn runs_of_the_same_answer_are_one() {
        let rules = |from, to| (from..to).map(|n| (n, Rule::Always(Answer::Allow))).collect::<Rules>();
        let length = |rules| compile(&rules, Answer::Errno(1)).len();
        assert_eq!(length(rules(3, 4)), length(rules(3, 400)));
    }
}
