// hold [MODE]: makes the kernel hold as much memory as possible in one way, reports it, and waits until it is killed.
// `uncounted` compares the memory that the machine has lost with what the sandbox's cgroup has counted. Without MODE, lists
// the modes.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <mqueue.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

// Bytes for all processes together: more than a quarter of the sandbox's memory, and less than all of it.
#define GOAL (36 << 20)
#define PROCESSES 56
#define FILTER 4000

static long share = GOAL, held, things;
static char block[1 << 16], name[300];
static struct timespec began;

// Whether to create one more object of about this many bytes. Stops after 3 seconds, so that slow machines create fewer.
static int more(long bytes) {
	struct timespec now;
	if (things % 32 == 0 && clock_gettime(CLOCK_MONOTONIC, &now) == 0 && now.tv_sec - began.tv_sec > 3) return 0;
	held += bytes;
	things++;
	return held <= share;
}
// Returns a new file name.
static char *next(const char *directory) {
	sprintf(name, "%s/%d-%ld", directory, getpid(), things);
	return name;
}
static int file(void) { return open(next("/tmp"), O_CREAT | O_RDWR, 0600); }
static void *map(long bytes) { return mmap(0, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }

static void nothing(void) { things = 1; }
static void memory(void) {
	char *place;
	while (more(1 << 20) && (place = malloc(1 << 20))) memset(place, 1, 1 << 20);
}
static void acl(void) {
	struct { unsigned short tag, may; unsigned id; } *entry = (void *)(block + 4);
	int entries = (sizeof block - 4) / sizeof *entry;
	*(unsigned *)block = 2;
	for (int i = 0; i < entries; i++) { entry[i].tag = 2; entry[i].may = 7; entry[i].id = 1; }
	entry[0].tag = 1;
	entry[entries - 3].tag = 4;
	entry[entries - 2].tag = 16;
	entry[entries - 1].tag = 32;
	const char *places[] = {"/tmp/acl", "/work/acl", "/dev/shm/acl"};
	for (int i = 0; i < 3; i++) {
		mkdir(places[i], 0700);
		if (setxattr(places[i], "system.posix_acl_default", block, 4 + entries * sizeof *entry, 0)) return;
		while (more(1 << 16) && mknod(next(places[i]), S_IFREG | 0700, 0) == 0);
	}
}
static void xattrs(void) {
	int with = file();
	while (more(1 << 12) && fsetxattr(with, next("user."), block, 1 << 12, 0) == 0);
}
static void filters(void) {
	struct sock_filter *steps = calloc(FILTER, sizeof *steps);
	steps[FILTER - 1].code = BPF_RET;
	struct sock_fprog program = {FILTER, steps};
	while (more(1 << 16)) {
		int with = socket(AF_UNIX, SOCK_DGRAM, 0);
		// Older kernels allow only shorter filters.
		for (program.len = FILTER; program.len > 99; program.len /= 2) {
			program.filter = steps + FILTER - program.len;
			if (setsockopt(with, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0) break;
		}
		if (program.len <= 99) return;
	}
}
static void own_filters(void) {
	struct sock_filter *steps = calloc(FILTER, sizeof *steps);
	for (int i = 0; i < FILTER - 1; i++) { steps[i].code = BPF_LD | BPF_W | BPF_ABS; steps[i].k = 8; }
	steps[FILTER - 1].code = BPF_RET;
	steps[FILTER - 1].k = 0x7fff0000;
	struct sock_fprog program = {FILTER, steps};
	while (more(100000) && prctl(PR_SET_SECCOMP, 2, &program) == 0);
}
static void huge(void) {
	const long size = 2 << 20;
	for (int i = 0; more(size); i++) {
		char *place = MAP_FAILED;
		int with = -1;
		if (i % 3 == 0) place = mmap(0, size, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
		if (i % 3 == 1 && (with = memfd_create("", MFD_HUGETLB)) >= 0 && ftruncate(with, size) == 0)
			place = mmap(0, size, 3, MAP_SHARED, with, 0);
		if (i % 3 == 2 && (with = shmget(IPC_PRIVATE, size, IPC_CREAT | SHM_HUGETLB | 0600)) >= 0) place = shmat(with, 0, 0);
		if (place == MAP_FAILED) { if (i > 2) return; } else *place = 1;
	}
}
static void pipes(void) {
	int ends[2];
	while (more(1 << 16) && pipe2(ends, O_NONBLOCK) == 0) {
		fcntl(ends[1], F_SETPIPE_SZ, 1 << 20);
		write(ends[1], block, 1 << 15);
	}
}
// Each packet takes a page of its own that is nearly empty.
static void packets(void) {
	int ends[2];
	while (more(0) && pipe2(ends, O_NONBLOCK | O_DIRECT) == 0) {
		fcntl(ends[1], F_SETPIPE_SZ, 1 << 18);
		while (more(1 << 12) && write(ends[1], block, 1) == 1);
	}
}
static void sockets_of(int kind, long bytes) {
	int ends[2], most = 1 << 20;
	while (more(0) && socketpair(AF_UNIX, kind | SOCK_NONBLOCK, 0, ends) == 0) {
		setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &most, sizeof most);
		while (more(bytes + 900) && write(ends[0], block, bytes) > 0);
	}
}
static void streams(void) { sockets_of(SOCK_STREAM, 1 << 15); }
static void datagrams(void) { sockets_of(SOCK_DGRAM, 1); }
static void sequenced(void) { sockets_of(SOCK_SEQPACKET, 3000); }
static void passed(void) {
	int ends[2], with = open("/dev/null", O_PATH);
	struct { struct cmsghdr head; int sent[200]; } control = {{sizeof control, SOL_SOCKET, SCM_RIGHTS}};
	struct iovec data = {block, 1};
	struct msghdr message = {0, 0, &data, 1, &control, sizeof control};
	for (int i = 0; i < 200; i++) control.sent[i] = with;
	while (more(0) && socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0)
		while (more(4096) && sendmsg(ends[0], &message, 0) > 0);
}
static void keys(void) {
	while (more(1 << 14) && syscall(SYS_add_key, "user", next(""), block, 1 << 14, -3) >= 0);
}
static void watches(void) {
	int some[100];
	struct epoll_event event = {EPOLLIN};
	for (int i = 0; i < 100; i++) some[i] = eventfd(0, 0);
	for (int on; more(0) && (on = epoll_create1(0)) >= 0;)
		for (int i = 0; i < 100 && more(200); i++) epoll_ctl(on, EPOLL_CTL_ADD, some[i], &event);
}
static void timers(void) {
	timer_t one;
	struct sigevent event = {.sigev_notify = SIGEV_NONE};
	while (more(400) && timer_create(CLOCK_MONOTONIC, &event, &one) == 0);
}
static void timer_files(void) { while (more(900) && timerfd_create(CLOCK_MONOTONIC, 0) >= 0); }
static void inotify(void) {
	int on = inotify_init1(0);
	while (more(1200) && mkdir(next("/tmp"), 0700) == 0 && inotify_add_watch(on, name, IN_CREATE) >= 0);
}
static void mounts(void) {
	if (unshare(CLONE_NEWUSER | CLONE_NEWNS)) return;
	while (more(4096) && mount("none", "/tmp", "tmpfs", 0, 0) == 0);
}
static void namespaces(void) { while (more(8192) && unshare(CLONE_NEWUSER) == 0); }
static void no_names(void) {
	struct stat found;
	memset(block, 'x', 200);
	do { next("/usr/include"); strcat(name, block); } while (more(1200) && (stat(name, &found), errno == ENOENT));
}
static void tree(void) {
	chdir("/tmp");
	while (more(1500) && mkdir("d", 0700) == 0 && chdir("d") == 0);
}
static void links(void) {
	memset(block, 'x', 127);
	while (more(1200) && symlink(block, next("/dev/shm")) == 0);
}
static void files(void) { while (more(800) && open("/usr/bin/tcc", 0) >= 0); }
static void paths(void) { while (more(400) && open("/usr", O_PATH) >= 0); }
static void directories(void) {
	int one;
	while (more(1 << 14) && (one = open("/proc", O_DIRECTORY)) >= 0) syscall(SYS_getdents64, one, block, sizeof block);
}
static void reports(void) {
	int one;
	while (more(8192) && (one = open("/proc/self/maps", 0)) >= 0) read(one, block, 1);
}
static void flocks(void) {
	int first = file();
	while (more(600) && first >= 0) {
		int one = open(name, O_RDWR);
		if (one < 0 || flock(one, LOCK_SH)) return;
		sprintf(name, "/proc/self/fd/%d", first);
	}
}
static void locks_by(int how) {
	int on;
	// Few locks per file, because each lock makes the next one on the same file slower.
	while (more(0) && (on = file()) >= 0) {
		struct flock lock = {.l_type = F_WRLCK, .l_len = 1};
		while (lock.l_start < 400 && more(180) && fcntl(on, how, &lock) == 0) lock.l_start += 2;
	}
}
static void locks(void) { locks_by(F_SETLK); }
static void open_locks(void) { locks_by(F_OFD_SETLK); }
static void leases(void) {
	int one;
	while (more(1200) && (one = file()) >= 0 && fcntl(one, F_SETLEASE, F_WRLCK) == 0);
}
static void signals(void) {
	sigset_t all;
	union sigval value = {0};
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, 0);
	while (more(100) && sigqueue(getpid(), SIGRTMIN, value) == 0);
}
static void events(void) { while (more(500) && eventfd(0, 0) >= 0); }
static void shm(void) {
	int one;
	char *place;
	while (more(1 << 16) && (one = shmget(IPC_PRIVATE, 1 << 16, IPC_CREAT | 0600)) >= 0) {
		if ((place = shmat(one, 0, 0)) == (void *)-1) return;
		memset(place, 1, 1 << 16);
	}
}
static void semaphores(void) {
	int one;
	struct sembuf undone = {0, 1, SEM_UNDO};
	while (more(32000 * 64) && (one = semget(IPC_PRIVATE, 32000, IPC_CREAT | 0600)) >= 0) semop(one, &undone, 1);
}
static void messages(void) {
	int one;
	*(long *)block = 1;
	while (more(0) && (one = msgget(IPC_PRIVATE, IPC_CREAT | 0600)) >= 0)
		while (more(4096) && msgsnd(one, block, 4000, IPC_NOWAIT) == 0);
}
static void queues(void) {
	mqd_t one;
	while (more(2048) && (one = mq_open(next(""), O_CREAT | O_RDWR | O_NONBLOCK, 0600, 0)) >= 0)
		while (more(8192) && mq_send(one, block, 8192, 0) == 0);
}
static void memfds(void) {
	int one;
	while (more(1 << 16) && (one = memfd_create("", 0)) >= 0 && write(one, block, 1 << 16) > 0);
}
static void mappings(void) {
	char *place = map(1L << 30);
	for (long at = 0; more(480); at += 8192) if (mprotect(place + at, 4096, PROT_READ)) return;
}
static void named_mappings(void) {
	char *place = map(1L << 30);
	memset(name, 'x', 79);
	for (long at = 0; more(200); at += 4096) {
		sprintf(block, "%070ld", things);
		if (prctl(0x53564d41, 0, place + at, 4096, block)) return;
	}
}
static void policies(void) {
	char *place = map(1L << 30);
	unsigned long nodes = 1;
	for (long at = 0; more(300); at += 8192)
		if (syscall(SYS_mbind, place + at, 4096, 2, &nodes, 2, 0)) return;
}
static void tables(void) {
	volatile char *place = mmap(0, 1L << 40, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (place != MAP_FAILED) for (long at = 0; more(4096); at += 2 << 20) name[0] += place[at];
}
static void terminals(void) {
	int one;
	while (more(1 << 14) && (one = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK)) >= 0) write(one, block, 1 << 13);
}
static void rulesets(void) {
	struct { unsigned long all; } handled = {8};
	struct __attribute__((packed)) { unsigned long all; int below; } rule = {8};
	for (int one; more(0) && (one = syscall(444, &handled, 8L, 0L)) >= 0;)
		for (int i = 0; i < 30 && more(2500); i++) {
			if (mkdir(next("/tmp"), 0700)) return;
			rule.below = open(name, O_PATH);
			int failed = syscall(445, one, 1L, &rule, 0L);
			close(rule.below);
			if (failed) return;
		}
}
static int sleeps(void *_) { pause(); return 0; }
static void threads(void) {
	while (more(1 << 16)) {
		char *stack = map(1 << 16);
		mprotect(stack, 1 << 16, PROT_READ | PROT_WRITE);
		if (clone(sleeps, stack + (1 << 16), CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM, 0) < 0) return;
	}
}
static void zombies(void) {
	for (int pid; more(1 << 15) && (pid = fork()) >= 0;) if (pid == 0) _exit(0);
}


// Modes that do not hold memory, but cause work on the host or change its state, TIMES times or endlessly.
#define TIMES 100
static void garbage(void) {
	for (; things < TIMES; things++) {
		int one = open("/tmp/garbage", O_CREAT | O_TRUNC | O_WRONLY, 0700);
		unsigned char text[] = {0xff, 0xfe, 0x80 + things % 100, 0x80 + things / 100, 0};
		write(one, text, sizeof text);
		close(one);
		execl("/tmp/garbage", "garbage", NULL);
	}
}
// These ioctls on any socket request the modules for bridges and VLANs.
static void modules(void) {
	for (int one = socket(AF_UNIX, SOCK_STREAM, 0); things < TIMES; things++) {
		ioctl(one, 0x8940, block);
		ioctl(one, 0x8982, block);
	}
}
static void flush(void) {
	static const char *const files[] = {"/", "/usr/bin", "/usr/bin/tcc", "/run/coderunner-init"};
	for (; things < TIMES; things++) {
		int one = open(files[things % 4], O_RDONLY);
		fsync(one);
		close(one);
	}
}
static void touch(void) { for (; things < TIMES; things++) utimensat(AT_FDCWD, "/dev/null", 0, 0); }
static void score(void) {
	int one = open("/proc/self/oom_score_adj", O_WRONLY);
	things = write(one, "0", 1);
}
static void evict(void) {
	things = 1;
	if (fork()) return;
	for (int one = open("/usr/bin/tcc", 0);; usleep(10000)) posix_fadvise(one, 0, 0, POSIX_FADV_DONTNEED);
}

// `many` is 1 for modes with a limit per process, which run in many processes, and -1 for modes that hold no memory.
static const struct { const char *name; void (*hold)(void); int many; } modes[] = {
	{"nothing", nothing}, {"memory", memory}, {"acl", acl}, {"xattrs", xattrs}, {"filters", filters, 1},
	{"own-filters", own_filters, 1}, {"huge", huge}, {"pipes", pipes, 1}, {"packets", packets, 1}, {"streams", streams, 1},
	{"datagrams", datagrams, 1}, {"sequenced", sequenced, 1}, {"passed", passed, 1}, {"keys", keys}, {"watches", watches, 1},
	{"timers", timers}, {"timer-files", timer_files, 1}, {"inotify", inotify}, {"mounts", mounts},
	{"namespaces", namespaces}, {"no-names", no_names}, {"tree", tree}, {"links", links}, {"files", files, 1}, {"paths", paths, 1},
	
	{"directories", directories, 1}, {"reports", reports, 1}, {"flocks", flocks, 1}, {"locks", locks, 1},
	{"open-locks", open_locks, 1}, {"leases", leases, 1}, {"signals", signals}, {"events", events, 1}, {"shm", shm},
	{"semaphores", semaphores}, {"messages", messages}, {"queues", queues}, {"memfds", memfds, 1},
	{"mappings", mappings, 1}, {"named-mappings", named_mappings, 1}, {"policies", policies, 1}, {"tables", tables},
	{"terminals", terminals, 1}, {"rulesets", rulesets, 1}, {"threads", threads}, {"zombies", zombies},
	{"garbage", garbage, -1}, {"modules", modules, -1}, {"flush", flush, -1}, {"touch", touch, -1}, {"score", score, -1},
	{"evict", evict, -1},
};

// Prints how many pages of a file are in memory, and how many are not.
static int resident(const char *path) {
	int one = open(path, O_RDONLY), pages = (lseek(one, 0, SEEK_END) + 4095) / 4096, there = 0;
	unsigned char *each = malloc(pages);
	if (mincore(mmap(0, pages * 4096L, PROT_READ, MAP_SHARED, one, 0), pages * 4096L, each)) return 2;
	for (int i = 0; i < pages; i++) there += each[i] & 1;
	printf("%d %d\n", there, pages - there);
	return 0;
}

int main(int argc, char **argv) {
	int ends[2], all = 0;
	const int count = sizeof modes / sizeof *modes;
	clock_gettime(CLOCK_MONOTONIC, &began);
	if (argc < 2) {
		for (int i = 0; i < count; i++) if (modes[i].many >= 0) puts(modes[i].name);
		return 0;
	}
	if (argc > 2) return resident(argv[2]);
	int mode = 0;
	while (strcmp(modes[mode].name, argv[1])) if (++mode == count) return 2;
	int processes = modes[mode].many > 0 ? PROCESSES : 1;
	pipe(ends);
	share /= processes;
	for (int i = 0; i < processes; i++) {
		int pid = fork();
		if (pid < 0) break;
		all++;
		if (pid > 0) continue;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		errno = 0;
		modes[mode].hold();
		long told[] = {things, held <= share ? errno : 0};
		write(ends[1], told, sizeof told);
		for (;;) pause();
	}
	long told[2], sum = 0, why = 0;
	for (int i = 0; i < all && read(ends[0], told, sizeof told) > 0; i++) { sum += told[0]; if (told[1]) why = told[1]; }
	printf("held: %ld%s%s\n", sum, why ? ", then: " : "", why ? strerror(why) : "");
	fflush(stdout);
	pause();
}
