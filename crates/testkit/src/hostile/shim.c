/* A hostile machine, for tests: loaded with LD_PRELOAD into the real binary, it stands between it and the C library.
 *
 * HOSTILE_FILES is the folder whose files it minds; HOSTILE_CONTROL is a folder of switches, each a file that may come
 * and go while the process runs:
 *
 *   journal   (there at the start) every change of a file, with its bytes, and every sync is appended to it, in order
 *   die       the process is killed before its next change of a file: the journal and the files agree exactly
 *   full      this number of bytes are free: what would extend a file by more fails with ENOSPC, and statvfs says the same
 *   quota     the same with EDQUOT, and statvfs knows nothing of it
 *   eio       a sync of a file whose name ends so fails, and what was to be synced is lost: fsync says of it once
 *   hang      a sync of a file whose name ends so does not begin until the switch is off
 *   slow      a number of milliseconds and the end of a name: a sync of such a file needs this time more
 *   readonly  an errno and the end of a name: opening such a file for writing, and making it, fails
 *   clock     this number of seconds are added to the wall clock
 *   threads   no more than this number of threads at a time
 *
 * -shm and .lock are not minded: SQLite builds the one again, and the other has no content that matters.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { CREATE = 1, WRITE, TRUNCATE, SYNC_BEGIN, SYNC_END, SYNC_FAILED, UNLINK };

#define FDS 65536
/* The name of each minded file that is open, from the folder; "." is the folder itself. */
static char *names[FDS];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX], control[PATH_MAX];
static int journal = -1;
static uint64_t syncs;

static int (*real_open)(const char *, int, ...);
static int (*real_close)(int);
static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static int (*real_ftruncate)(int, off_t);
static int (*real_fsync)(int), (*real_fdatasync)(int);
static int (*real_unlink)(const char *);
static int (*real_clock_gettime)(clockid_t, struct timespec *);
static int (*real_pthread_create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
static int (*real_statvfs)(const char *, struct statvfs *), (*real_fstatvfs)(int, struct statvfs *);

static int switch_path(char *path, const char *name) {
    return control[0] && snprintf(path, PATH_MAX, "%s/%s", control, name) < PATH_MAX;
}

__attribute__((constructor)) static void start(void) {
#define REAL(function) *(void **)&real_##function = dlsym(RTLD_NEXT, #function)
    REAL(open); REAL(close); REAL(write); REAL(ftruncate); REAL(fsync); REAL(fdatasync); REAL(unlink);
    REAL(pwrite); REAL(clock_gettime); REAL(pthread_create); REAL(statvfs); REAL(fstatvfs);
    const char *files = getenv("HOSTILE_FILES"), *switches = getenv("HOSTILE_CONTROL");
    if (!files || !switches || !realpath(files, folder) || !realpath(switches, control)) {
        folder[0] = control[0] = 0;
        return;
    }
    char path[PATH_MAX];
    if (switch_path(path, "journal")) journal = real_open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
}

/* The text of a switch; false if it is off. */
static int is_on(const char *name, char *text, size_t size) {
    char path[PATH_MAX];
    if (!switch_path(path, name)) return 0;
    int saved = errno, fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0) {
        errno = saved;
        return 0;
    }
    ssize_t length = syscall(SYS_read, fd, text, size - 1);
    syscall(SYS_close, fd);
    text[length > 0 ? length : 0] = 0;
    errno = saved;
    return 1;
}

static int ends_with(const char *name, const char *suffix) {
    size_t length = strlen(name), end = strlen(suffix);
    return length >= end && !strcmp(name + length - end, suffix);
}

static const char *name_in_folder(const char *path) {
    size_t length = strlen(folder);
    if (!length || strncmp(path, folder, length)) return NULL;
    if (!path[length]) return ".";
    const char *name = path + length + 1;
    return path[length] != '/' || ends_with(name, "-shm") || ends_with(name, ".lock") ? NULL : name;
}

static const char *name_of(int fd) { return fd >= 0 && fd < FDS ? names[fd] : NULL; }

static void append(uint8_t op, const char *name, uint64_t number, const void *data, size_t length) {
    if (journal < 0) return;
    uint32_t name_length = (uint32_t)strlen(name), total = 4 + 1 + 4 + 8 + name_length + (uint32_t)length;
    char *record = malloc(total), *at = record;
    memcpy(at, &total, 4), at += 4;
    memcpy(at, &op, 1), at += 1;
    memcpy(at, &name_length, 4), at += 4;
    memcpy(at, &number, 8), at += 8;
    memcpy(at, name, name_length), at += name_length;
    if (length) memcpy(at, data, length);
    if (real_write(journal, record, total) != (ssize_t)total) abort();
    free(record);
}

/* Before a change: the mutex is held until after it, so that no other process has one half done when the process is killed. */
static void begin(void) {
    pthread_mutex_lock(&mutex);
    char text[8];
    if (is_on("die", text, sizeof text)) kill(getpid(), SIGKILL), pause();
}

static void end(void) {
    int saved = errno;
    pthread_mutex_unlock(&mutex);
    errno = saved;
}

/* Whether a file may become so long; sets errno. */
static int may_grow(int fd, off_t length) {
    char text[32];
    struct stat now;
    int error = is_on("full", text, sizeof text) ? ENOSPC : is_on("quota", text, sizeof text) ? EDQUOT : 0;
    if (!error || fstat(fd, &now) || length - now.st_size <= (length > now.st_size ? atoll(text) : 0)) return 1;
    errno = error;
    return 0;
}

static int minded_open(const char *path, int flags, mode_t mode) {
    char whole[PATH_MAX], link[64];
    int writes = (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT, fd;
    if (!folder[0]) return real_open(path, flags, mode);
    /* Whether it is ours is known once it is open; what is to be made or changed has a folder that says. */
    char parent[PATH_MAX], text[256];
    snprintf(parent, sizeof parent, "%s", path);
    char *slash = strrchr(parent, '/');
    if (slash) slash == parent ? (void)(parent[1] = 0) : (void)(*slash = 0);
    int ours = writes && realpath(slash ? parent : ".", whole) && !strcmp(whole, folder);
    if (ours && is_on("readonly", text, sizeof text)) {
        char *suffix = text;
        long error = strtol(text, &suffix, 10);
        if (ends_with(path, suffix + (*suffix == ' '))) {
            errno = (int)error;
            return -1;
        }
    }
    if (ours) begin();
    int made = ours && flags & O_CREAT && access(path, F_OK);
    fd = real_open(path, flags, mode);
    if (fd >= 0 && fd < FDS) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, whole, sizeof whole - 1);
        whole[length > 0 ? length : 0] = 0;
        const char *name = name_in_folder(whole);
        names[fd] = name ? strdup(name) : NULL;
        if (name && made) append(CREATE, name, 0, NULL, 0);
        if (name && flags & O_TRUNC) append(TRUNCATE, name, 0, NULL, 0);
    }
    if (ours) end();
    return fd;
}

#define OPEN(function)                                              \
    int function(const char *path, int flags, ...) {                \
        mode_t mode = 0;                                            \
        if (flags & (O_CREAT | O_TMPFILE)) {                        \
            va_list rest;                                           \
            va_start(rest, flags);                                  \
            mode = va_arg(rest, mode_t);                            \
            va_end(rest);                                           \
        }                                                           \
        return minded_open(path, flags, mode);                      \
    }
OPEN(open)
OPEN(open64)

int close(int fd) {
    if (name_of(fd)) {
        pthread_mutex_lock(&mutex);
        free(names[fd]);
        names[fd] = NULL;
        pthread_mutex_unlock(&mutex);
    }
    return real_close(fd);
}

static ssize_t minded_pwrite(int fd, const void *data, size_t size, off_t offset) {
    if (!name_of(fd)) return real_pwrite(fd, data, size, offset);
    begin();
    ssize_t written = may_grow(fd, offset + (off_t)size) ? real_pwrite(fd, data, size, offset) : -1;
    if (written > 0) append(WRITE, names[fd], (uint64_t)offset, data, (size_t)written);
    end();
    return written;
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return minded_pwrite(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) { return minded_pwrite(fd, data, size, offset); }

ssize_t write(int fd, const void *data, size_t size) {
    if (!name_of(fd)) return real_write(fd, data, size);
    off_t offset = lseek(fd, 0, fcntl(fd, F_GETFL) & O_APPEND ? SEEK_END : SEEK_CUR);
    ssize_t written = minded_pwrite(fd, data, size, offset);
    if (written > 0) lseek(fd, offset + written, SEEK_SET);
    return written;
}

static int minded_ftruncate(int fd, off_t length) {
    if (!name_of(fd)) return real_ftruncate(fd, length);
    begin();
    int result = may_grow(fd, length) ? real_ftruncate(fd, length) : -1;
    if (!result) append(TRUNCATE, names[fd], (uint64_t)length, NULL, 0);
    end();
    return result;
}
int ftruncate(int fd, off_t length) { return minded_ftruncate(fd, length); }
int ftruncate64(int fd, off_t length) { return minded_ftruncate(fd, length); }

static void pause_ms(long ms) {
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

/* Without the mutex: the disk hangs for this file only. */
static void delay_sync(const char *name) {
    char text[256], *suffix = text;
    while (is_on("hang", text, sizeof text) && ends_with(name, text)) pause_ms(10);
    if (!is_on("slow", text, sizeof text)) return;
    long ms = strtol(text, &suffix, 10);
    if (ends_with(name, suffix + (*suffix == ' '))) pause_ms(ms);
}

/* What was written before the sync began is on the disk once it has ended; of what is written meanwhile no process knows. */
static int minded_sync(int fd, int (*sync)(int)) {
    if (!name_of(fd)) return sync(fd);
    char suffix[256];
    delay_sync(names[fd]);
    begin();
    int fails = is_on("eio", suffix, sizeof suffix) && ends_with(names[fd], suffix);
    uint64_t id = ++syncs;
    append(SYNC_BEGIN, names[fd], id, NULL, 0);
    if (fails) append(SYNC_FAILED, names[fd], id, NULL, 0), errno = EIO;
    end();
    if (fails) return -1;
    int result = sync(fd);
    begin();
    append(result ? SYNC_FAILED : SYNC_END, names[fd], id, NULL, 0);
    end();
    return result;
}
int fsync(int fd) { return minded_sync(fd, real_fsync); }
int fdatasync(int fd) { return minded_sync(fd, real_fdatasync); }

int unlink(const char *path) {
    char whole[PATH_MAX];
    const char *name = folder[0] && realpath(path, whole) ? name_in_folder(whole) : NULL;
    if (!name) return real_unlink(path);
    begin();
    int result = real_unlink(path);
    if (!result) append(UNLINK, name, 0, NULL, 0);
    end();
    return result;
}

#define STATVFS(function, type, subject)                                        \
    int function(type subject, struct statvfs *delivered) {                          \
        char text[32];                                                          \
        int result = real_##function(subject, delivered);                            \
        if (!result && is_on("full", text, sizeof text))                        \
            delivered->f_bavail = delivered->f_bfree = (fsblkcnt_t)atoll(text) / delivered->f_frsize; \
        return result;                                                          \
    }
STATVFS(statvfs, const char *, path)
STATVFS(fstatvfs, int, fd)
int statvfs64(const char *path, struct statvfs64 *delivered) { return statvfs(path, (struct statvfs *)delivered); }
int fstatvfs64(int fd, struct statvfs64 *delivered) { return fstatvfs(fd, (struct statvfs *)delivered); }

/* The switch is read every 10 ms at most: the clock is asked often. */
static time_t shift(void) {
    static _Atomic long long read_at_ms, seconds;
    struct timespec now;
    char text[32];
    real_clock_gettime(CLOCK_MONOTONIC, &now);
    long long now_ms = (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    if (control[0] && now_ms - read_at_ms > 10) {
        seconds = is_on("clock", text, sizeof text) ? atoll(text) : 0;
        read_at_ms = now_ms;
    }
    return (time_t)seconds;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = real_clock_gettime(clock, now);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec, now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument) {
    char text[16];
    if (is_on("threads", text, sizeof text)) {
        /* The directory of the threads has a link for each, besides its own two. */
        struct stat tasks;
        if (!stat("/proc/self/task", &tasks) && (long)tasks.st_nlink - 2 >= atol(text)) return EAGAIN;
    }
    return real_pthread_create(thread, attributes, body, argument);
}
